"""From a SPEC on the command line to a Subject.

Resolved in this order: an existing directory; `file.py:attr`; `transformers:TYPE`; `pkg.mod:attr`; a hub id.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmconform.conventions import first_line
from lmconform.subject import BuildError, Subject, UnloadableTokenizer

if TYPE_CHECKING:
    from types import ModuleType

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json", "merges.txt")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_spec(spec: str, *, trust_remote_code: bool = False) -> Subject:
    """The Subject that a SPEC names. Nothing is built yet. Raises BuildError that says where it looked."""
    subject = _resolve(spec, trust_remote_code)
    subject.spec = spec
    return subject


def _resolve(spec: str, trust_remote_code: bool) -> Subject:
    if Path(spec).is_dir():
        return _checkpoint(spec, trust_remote_code, name=Path(spec).resolve().name)
    place, _, attribute = spec.rpartition(":")
    if place.endswith(".py"):
        return _attribute(_import_file(place), attribute, spec)
    if place == "transformers":
        return _transformers_type(attribute, spec)
    if place:
        return _attribute(_import_module(place, spec), attribute, spec)
    if spec.endswith(".py"):
        raise BuildError(f"{spec}: name the attribute too, as in {spec}:build")
    if HUB_ID.fullmatch(spec) and not spec.startswith((".", "/")):
        return _checkpoint(spec, trust_remote_code, name=spec)
    raise BuildError(
        f"{spec!r} is no existing directory, no file.py:attr, no transformers:TYPE, no pkg.mod:attr and no hub id"
    )


def import_first(module: str) -> None:
    """`--import MODULE`: for a checkpoint whose model_type is registered there. Raises BuildError."""
    _import_module(module, f"--import {module}")


def _import_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
        raise BuildError(f"{path}: no such file" + (f"; did you mean {file.parent / near[0]}?" if near else ""))
    name = f"_lmconform_subject_{file.stem}_{hashlib.sha1(str(file.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(file.resolve().parent)
    if folder not in sys.path:  # a script finds the modules beside it
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _import_error(path, error) from error
    return module


def _import_module(name: str, spec: str) -> ModuleType:
    if sys.path[:1] not in ([""], [str(Path.cwd())]):  # the console script leaves the current directory out
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise BuildError(f"{spec}: there is no module {error.name} (sys.path begins with {Path.cwd()})") from error
        raise _import_error(spec, error) from error
    except BaseException as error:
        raise _import_error(spec, error) from error


def _import_error(what: str, error: BaseException) -> BuildError:
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, SystemExit):
        return BuildError(f"{what}: importing it called sys.exit({error.code!r})")
    return BuildError(f"{what}: importing it raised {type(error).__name__}: {first_line(error)}")


def _attribute(module: ModuleType, attribute: str, spec: str) -> Subject:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(module) if not name.startswith("_")]
            near = difflib.get_close_matches(attribute, public, n=1)
            raise BuildError(
                f"{spec}: {spec.rpartition(':')[0]} has no attribute {attribute!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        found = getattr(found, part)
    if isinstance(found, Subject):
        return found
    try:
        return Subject(found, name=attribute)
    except TypeError as error:
        raise BuildError(f"{spec}: {error}") from error


def _transformers_type(model_type: str, spec: str) -> Subject:
    def build() -> Any:  # transformers is imported here, not when the SPEC is read
        import torch

        from lmconform import shrinking

        try:
            return shrinking.tiny_model(model_type, seed=torch.initial_seed() % (1 << 31))
        except (shrinking.UnknownType, shrinking.Unshrinkable) as error:
            raise BuildError(f"{spec}: {error}") from error

    return Subject(build, name=model_type)


def _checkpoint(place: str, trust_remote_code: bool, name: str) -> Subject:
    def build() -> Any:
        from transformers import AutoModelForCausalLM

        # a checkpoint of an older kind holds pickles: they are read with weights_only, never run
        try:
            return AutoModelForCausalLM.from_pretrained(
                place, trust_remote_code=trust_remote_code, weights_only=True, dtype="auto"
            )
        except Exception as error:
            raise BuildError(
                f"{place}: loading the checkpoint raised {type(error).__name__}: {first_line(error)}"
                + _meant_type(place)
            ) from error

    def build_with_tokenizer() -> Any:
        model = build()
        return model, _tokenizer(place, trust_remote_code)

    return Subject(build_with_tokenizer, name=name)


def _meant_type(place: str) -> str:
    """A hint for `llama` where `transformers:llama` was meant."""
    from lmconform import shrinking

    return f"; did you mean transformers:{place}?" if place in shrinking.causal_types() else ""


def _tokenizer(place: str, trust_remote_code: bool) -> Any | None:
    """The checkpoint's tokenizer, None where it has none, and the reason where it cannot be loaded."""
    folder = Path(place)
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if not folder.is_dir():  # a hub id may have none
            return None
        return UnloadableTokenizer(f"the tokenizer could not be loaded: {type(error).__name__}: {first_line(error)}")
