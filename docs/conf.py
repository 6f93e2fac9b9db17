"""The site: sphinx-build -W -n --keep-going docs docs/_build

The pages are Markdown that reads well without it. Three things are added here: docstrings are taken as the plain text
they are, `module.name` in code letters leads to the reference, and a link to a source file to its page.
"""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util.nodes import make_refnode

from ddpm_jax import __version__, options

ROOT = Path(__file__).parent.parent

project, author, release = "ddpm_jax", "the ddpm_jax authors", __version__
copyright = f"2026, {author}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]  # the second is where myst-nb writes what it has run
nitpick_ignore_regex = [("py:.*", r"(?!ddpm_jax\.).*")]  # types of other libraries
highlight_language = "none"
smartquotes = False  # which would make one dash of the two before an option
html_theme = "furo"
html_title = "ddpm_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"  # delete docs/_build to run the tutorial again after a change of the library
nb_execution_cache_path = str(Path(__file__).parent / "_build" / ".jupyter_cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # warnings of the machine
nb_merge_streams = True

autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100


def escaped(text):
    """Plain text as reStructuredText, `names` in code letters."""
    parts = text.split("`")
    return "".join(f"``{part}``" if i % 2 else re.sub(r"([^\w\s]|_)", r"\\\1", part) for i, part in enumerate(parts))


def paragraphs(lines):
    """A docstring's lines as reStructuredText: what is indented stays as it is, all else is running text."""
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        if all(row.startswith(" ") for row in rows):
            yield from ["::", "", *rows, ""]
        else:
            yield from [*(escaped(row.strip()) for row in rows), ""]


def has_options(thing):
    return inspect.isclass(thing) and issubclass(thing, options.Section) and dataclasses.is_dataclass(thing)


def fields(cls):
    """The fields of a section of the config, or of a script's options, as they are written on the command line."""
    prefix = "" if issubclass(cls, options.Arguments) else f"config.{cls.__name__.lower()}."
    for name, field, _, value in options.leaves(cls, cls()):
        if "help" in field.metadata and "." not in name:
            spelled = prefix + name if prefix else name.replace("_", "-")
            rules = [text for text, _ in field.metadata["rules"]] if prefix else []
            meaning = escaped("; ".join([field.metadata["help"], *rules]))
            yield from [f"``--{spelled}={options.to_text(value)}``", f"    {meaning}", ""]


def tables(module):
    """The dicts of a module that names are looked up in, and what stands in them."""
    for name in re.findall(r"(?m)^([A-Z][A-Z_]+) = \{", inspect.getsource(module)):
        entries = vars(module)[name]
        names = " ".join(f"``{key}``" for key in (sorted(entries) if isinstance(entries, set) else entries))
        yield from [f".. py:data:: {name}", "", f"   {names}", ""]


def docstring(app, what, name, thing, _, lines):
    generated = inspect.isclass(thing) and (thing.__doc__ or "").startswith(f"{thing.__name__}(")
    field = lines[:1] and lines[0].startswith("Alias for field number")  # of a NamedTuple
    lines[:] = [] if generated or field else paragraphs(lines)
    if has_options(thing):
        lines += fields(thing)
    if what == "module":
        lines += tables(thing)


def signature(app, what, name, thing, _, arguments, returned):
    """None for the classes of options, which have dozens of arguments; of a network, those that it declares itself."""
    if has_options(thing):
        return "", None
    declared, of_linen, _ = (arguments or "").partition(", parent:")
    return (f"{declared})", None) if what == "class" and of_linen else None


def spellings(full):
    """How the pages may write the name of an object: with and without ddpm_jax, and as the package re-exports it."""
    _, *path, name = full.split(".")
    yield from (full, full.removeprefix("ddpm_jax."))
    if len(path) == 2 and hasattr(sys.modules.get(f"ddpm_jax.{path[0]}"), name):
        yield f"{path[0]}.{name}"


def link(app, doctree, docname):
    """Lead from names in code letters to the reference, and from links to source files to their pages."""
    objects = app.env.get_domain("py").objects
    known = {spelled: full for full in objects if full.startswith("ddpm_jax.") for spelled in spellings(full)}
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        if name in known and not isinstance(literal.parent, nodes.reference):
            at = objects[known[name]]
            literal.replace_self(make_refnode(app.builder, docname, at.docname, at.node_id, literal.deepcopy(), name))
    for download in list(doctree.findall(addnodes.download_reference)):
        path = (Path(app.srcdir) / docname).parent.joinpath(download["reftarget"]).resolve().relative_to(ROOT)
        name = ".".join(path.with_suffix("").parts)
        if name in sys.modules:
            page = app.builder.get_relative_uri(docname, "_modules/" + name.replace(".", "/"))
            download.replace_self(nodes.reference("", "", *download.children, internal=True, refuri=page))


def setup(app):
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("doctree-resolved", link)
