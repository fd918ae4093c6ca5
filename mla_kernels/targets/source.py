"""A kernel's own source, cut out of its file so that any compiler can read it without the rest of the package.

The Ascend compiler lives in another Python environment, without torch; the emulator, the offline compilers and the hash
that keys every cache all work on this one text.
"""

import ast
import builtins
import functools
import importlib.util
import inspect
import io
import sys
import tokenize
from pathlib import Path

HEADER = "import triton\nimport triton.language as tl\n"


def python_function(kernel):
    """The plain function behind a ``@triton.jit`` object (compiled or interpreted)."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def standalone(kernel) -> str:
    """Source of a module that defines ``kernel``, the jit functions it calls and the ``tl.constexpr`` globals they use.

    Names are followed through module-level definitions and ``from mla_kernels... import`` lines; an import from a
    module of Triton is kept. Anything else that a kernel names must be a builtin, ``tl`` or ``triton``; NameError says
    which name could not be found, or which one two modules define.
    """
    function = python_function(kernel)
    pieces: dict[str, tuple[str, str]] = {}
    _collect(function.__module__, function.__name__, pieces)
    return HEADER + "\n\n" + "\n\n".join(text for _, text in pieces.values()) + "\n"


def code_of(source: str) -> str:
    """A module's tokens without its comments, docstrings and layout: equal for two texts of the same code."""
    documented = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
    docstrings = {(node.body[0].lineno, node.body[0].col_offset) for node in documented}
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    marks = {tokenize.INDENT: "{", tokenize.DEDENT: "}"}
    return " ".join(
        marks.get(token.type, token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in layout and token.start not in docstrings
    )


def _collect(module_name: str, name: str, pieces: dict[str, tuple[str, str]]) -> None:
    """Add the definition of ``name`` in a module, behind what it needs, as name -> (module, text)."""
    source, definitions, imports = _module(module_name)
    if name in imports:
        origin, original = imports[name]
        _collect(origin, original, pieces)
        if original != name:
            _add(pieces, name, module_name, f"{name} = {original}")
        return
    if name not in definitions:
        raise NameError(f"kernel source of {module_name}: {name!r} is not a module-level jit function or tl.constexpr")
    if pieces.get(name, ("", ""))[0] == module_name:
        return
    node = definitions[name]
    own = {argument.arg for argument in getattr(getattr(node, "args", None), "args", [])}
    assigned = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    for other in used:
        known = other in own or other in assigned or other in ("tl", "triton") or hasattr(builtins, other)
        if not known and other != name:
            _collect(module_name, other, pieces)
    if isinstance(node, ast.ImportFrom):
        _add(pieces, name, "", ast.unparse(node))  # the same in whichever modules import it
        return
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    _add(pieces, name, module_name, "\n".join(source[start - 1 : node.end_lineno]))


def _add(pieces: dict[str, tuple[str, str]], name: str, module_name: str, text: str) -> None:
    other = pieces.setdefault(name, (module_name, text))
    if other != (module_name, text):
        raise NameError(f"kernel source: {name!r} is defined in {other[0]} and in {module_name}; rename one")


@functools.cache
def _module(module_name: str):
    loaded = sys.modules.get(module_name)
    if loaded is not None:
        text = inspect.getsource(loaded)
    else:  # only read: a file with Gluon kernels imports what this installation may lack
        text = Path(importlib.util.find_spec(module_name).origin).read_text()
    definitions, imports = {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mla_kernels"):
            imports.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton."):
            for alias in node.names:
                single = ast.ImportFrom(node.module, [alias], 0)
                definitions[alias.asname or alias.name] = ast.copy_location(single, node)
    return text.splitlines(), definitions, imports
