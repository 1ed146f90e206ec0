"""Pages of the documentation that are made of other files, while it is built.

mkdocs calls the functions named `on_...` (see mkdocs.yml). The first page is
README.md; measurements, examples, the changelog, every setting and the public
modules have pages too. So everything is written once, where it belongs.
"""

import functools
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

import cells
import settings_page
from agrpo_jax import __main__ as agrpo

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGE = _ROOT / "agrpo_jax"

# What others import: the spine, and folders of the package.
_SPINE = (
  *("config", "settings", "types", "errors", "data", "actor", "learner"),
  *("train", "optimizer"),
)
_LAYERS = (
  *("models", "policies", "samplers", "objectives", "tasks", "runs", "port"),
  "evaluation",
)

# Files of the project that have a page -> where it is.
_AT_THE_TOP = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
}
# Files that are shown otherwise: where they are named, there is a link to it.
_SHOWN = {"agrpo_jax/config.py": "settings.md"}
_FOLDERS = {"docs": "", "benchmarks/results": "results", "examples": "examples"}


@functools.cache
def _places() -> dict[str, str]:
  """Returns the files of the project that have a place on the site."""
  found = dict(_AT_THE_TOP)
  for folder, place in _FOLDERS.items():
    for file in sorted((_ROOT / folder).iterdir()):
      if file.suffix in (".md", ".png", ".py"):
        name = file.with_suffix(".md") if file.suffix == ".py" else file
        found[f"{folder}/{file.name}"] = posixpath.join(place, name.name)
  return found


def on_config(config: MkDocsConfig) -> None:
  """Puts the pages that are made here into the navigation."""
  places = _places().values()
  made = {
    "Measurements": [
      place for place in places if re.fullmatch(r"results/.*\.md", place)
    ],
    "Modules": [f"api/{name}.md" for name in ("spine", *_LAYERS)],
  }

  def fill(sections: list[Any]) -> None:
    for section in sections:
      if isinstance(section, dict):
        for title, inside in section.items():
          section[title] = made.get(title, inside)
          fill(inside)

  fill(config.nav or [])


def on_files(files: Files, config: MkDocsConfig) -> None:
  """Adds the pages that are no files in docs/."""
  for path, place in _places().items():
    if path.startswith("docs/"):
      continue  # mkdocs has found them
    file = _ROOT / path
    if file.suffix == ".png":
      files.append(File.generated(config, place, abs_src_path=str(file)))
      continue
    if file.suffix == ".py":
      text = cells.markdown(cells.read(file))
    else:
      text = file.read_text("utf-8")
    files.append(File.generated(config, place, content=text))
  made = {
    "commands.md": _commands(),
    "settings.md": settings_page.markdown(_PACKAGE / "config.py"),
    **{f"api/{name}.md": _modules(name) for name in ("spine", *_LAYERS)},
  }
  for place, text in made.items():
    files.append(File.generated(config, place, content=text))


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
  """Points links between files of the project to their pages.

  Raises:
    PluginError: a link to a file that has no page.
  """
  del kwargs
  places = _places()
  here = page.file.src_uri
  origin = next((path for path in places if places[path] == here), here)

  def to(path: str) -> str:
    place = places.get(path) or _SHOWN[path]
    return posixpath.relpath(place, posixpath.dirname(here))

  def linked(match: re.Match[str]) -> str:
    folder = posixpath.dirname(origin)
    path = posixpath.normpath(posixpath.join(folder, match[1]))
    if path not in places:
      raise PluginError(f"{origin}: {match[1]} has no page to link to.")
    return f"]({to(path)}{match[2] or ''})"

  def named(match: re.Match[str]) -> str:
    is_here = match[1] in places or match[1] in _SHOWN
    return f"[{match[0]}]({to(match[1])})" if is_here else match[0]

  lines = []
  for line, is_code in _lines(markdown):
    if not is_code:
      line = re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", linked, line)
      line = re.sub(r"(?<!\[)`([\w/]+\.(?:md|py))`", named, line)
    lines.append(line)
  return "\n".join(lines)


def on_post_page(output: str, page: Page, **kwargs: Any) -> None:
  """Raises PluginError if a page would fetch something from elsewhere."""
  del kwargs
  if re.search(r"<(script|img|iframe)[^>]* src=\W?\w+:", output) or re.search(
    r"<link[^>]* rel=\W?(stylesheet|preload)[^>]* href=\W?\w+:", output
  ):
    raise PluginError(f"{page.file.src_uri} fetches something from elsewhere.")


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
  """Yields lines, and whether they are of a block of code."""
  is_fenced = False
  for line in markdown.splitlines():
    is_fence = line.lstrip().startswith("```")
    yield line, is_fenced or is_fence or line.startswith("    ")
    is_fenced ^= is_fence


def _commands() -> str:
  """Returns what `--help` of every command begins with."""
  parts = [
    "# Commands",
    "`agrpo WORD --help` lists the flags. What has `--config` also takes "
    "`--config.KEY=VALUE`, for the keys of `agrpo_jax/config.py`.",
  ]
  for word in agrpo.WORDS:
    parts += [f"## agrpo {word}", agrpo.docstring(word)]
  return "\n\n".join(parts)


def _modules(name: str) -> str:
  """Returns the page of a folder of the package, or of the spine."""
  if name == "spine":
    title, modules = "The spine", [f"agrpo_jax.{one}" for one in _SPINE]
  else:
    title = f"{name}/"
    files = sorted((_PACKAGE / name).rglob("*.py"))
    modules = [
      ".".join(file.relative_to(_ROOT).with_suffix("").parts)
      for file in files
      if not file.stem.startswith("__")
    ]
  return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)])
