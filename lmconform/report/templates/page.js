// Filters, copy buttons, and links into folded parts. Without it the page shows everything.
"use strict";

for (const form of document.querySelectorAll("form.filters")) {
  const whole = document.getElementById(form.dataset.of);
  const rows = [...(whole.tBodies ? whole.tBodies[0] : whole).children];
  const texts = rows.map((row) => (row.querySelector(":scope > summary") || row).textContent.toLowerCase());
  const shown = form.nextElementSibling;
  const apply = () => {
    const given = new FormData(form);
    const statuses = new Set(given.getAll("status"));
    const family = given.get("family") || "";
    const words = (given.get("text") || "").toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, index) => {
      const fits = (!statuses.size || statuses.has(row.dataset.status))
        && (!family || row.dataset.families.split(" ").includes(family))
        && words.every((word) => texts[index].includes(word));
      row.hidden = !fits;
      count += fits;
    });
    shown.textContent = count === rows.length ? `${rows.length} shown` : `${count} of ${rows.length} shown`;
  };
  form.addEventListener("input", apply);
  form.querySelector("button").addEventListener("click", () => { form.reset(); apply(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

for (const block of document.querySelectorAll("pre.repro")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy the reproduction");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.textContent);
      button.textContent = "Copied";
    } catch { // a page opened from a file may not write to the clipboard: select it, so that Ctrl-C does
      getSelection().selectAllChildren(block);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  block.parentElement.append(button);
}

const reveal = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let part = target; part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
  }
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();
