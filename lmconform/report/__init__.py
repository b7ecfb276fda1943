"""How a Report is shown: on a terminal and as an HTML page."""
