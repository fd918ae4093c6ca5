"""From a jitted function of Gluon to a Python function of emulated names.

The function's own source is compiled again with one change, the compiler's: a number assigned to a variable becomes a
run-time scalar, unless the variable is annotated ``gl.constexpr``. Its globals and closure are replaced one by one.
"""

import ast
import builtins
import functools
import textwrap
import types
from collections.abc import Callable

from mla_kernels.targets.gluon import hopper, language
from mla_kernels.targets.gluon.values import as_block

TABLES = {"gl": language.FUNCTIONS, **hopper.FUNCTIONS}
"""Emulated functions by the module of Triton's that has them; ``gl`` is the language and whatever is not Hopper's."""


def _table(module: str) -> str:
    last = module.rpartition(".")[2]
    return last if last in TABLES else "gl"


class _Module:
    """A module of Triton inside a kernel. Spellings of every version are accepted."""

    def __init__(self, module, translation: "Translation"):
        self._module, self._translation = module, translation

    def __getattr__(self, name):
        table = TABLES[_table(self._module.__name__)]
        if name in table:
            return table[name]
        if not hasattr(self._module, name):
            raise AttributeError(f"{self._module.__name__} has no {name!r}")
        return self._translation.value(getattr(self._module, name))


class Translation:
    """Kernel objects -> emulated ones, each once."""

    def __init__(self):
        self._functions: dict[int, Callable] = {}

    def value(self, value):
        """What a kernel sees in place of ``value``. What it may not call is refused when it is called."""
        if isinstance(value, types.ModuleType):
            return _Module(value, self) if value.__name__.startswith("triton") else value
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(self.value(part) for part in value)
        kind = type(value).__name__
        if kind == "constexpr":
            return self.value(value.value)
        if kind == "ConstexprFunction":
            return value.fn
        if isinstance(value, type) and value.__module__.startswith("triton."):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            if value.__module__.startswith("triton."):
                return _emulated(value) or _refusal(f"{value.__module__}.{value.__name__} is not emulated")
            return _refusal(f"a kernel calls {value.__name__}, which is not jitted")
        if isinstance(getattr(value, "fn", None), types.FunctionType):
            return _emulated(value.fn) or self.function(value)
        if getattr(value, "__triton_aggregate__", False):
            return _refusal(f"aggregates are not emulated: {value}")
        return value

    @staticmethod
    def _class(value: type):
        if value.__name__ in ("static_range", "range"):
            return language.FUNCTIONS[value.__name__]
        if value.__name__ == "constexpr":
            return lambda constant: constant
        return value

    def function(self, jitted) -> Callable:
        """The emulated function of a jitted one."""
        if id(jitted) in self._functions:  # its own hash looks up every name that it uses
            return self._functions[id(jitted)]
        original = jitted.fn
        scope = {"__emulated__": True, "__builtins__": builtins, "__name__": original.__module__}
        scope |= {"range": language.FUNCTIONS["range"], _ASSIGNED: _assigned}
        scope |= {"min": language.FUNCTIONS["minimum"], "max": language.FUNCTIONS["maximum"]}
        free, path = original.__code__.co_freevars, original.__code__.co_filename
        exec(_compiled("".join(jitted.raw_src), path, jitted.starting_line_number, free), scope)
        made = scope.pop("around")(*(self.value(cell.cell_contents) for cell in original.__closure__ or ()))
        self._functions[id(jitted)] = made
        for name in _names(made.__code__):
            if name in original.__globals__:
                scope[name] = self.value(original.__globals__[name])
        made.__defaults__ = original.__defaults__ and tuple(map(self.value, original.__defaults__))
        keywords = original.__kwdefaults__
        made.__kwdefaults__ = keywords and {name: self.value(value) for name, value in keywords.items()}
        return made


_ASSIGNED = "__assigned__"


class _Assignments(ast.NodeTransformer):
    """``x = value`` -> ``x = __assigned__(value)``, and ``x += value`` likewise."""

    def visit_Assign(self, node):
        return ast.copy_location(ast.Assign(node.targets, self._wrapped(node.value)), node)

    def visit_AnnAssign(self, node):
        if node.value is None or "constexpr" in ast.unparse(node.annotation):
            return node
        return ast.copy_location(ast.Assign([node.target], self._wrapped(node.value)), node)

    def visit_AugAssign(self, node):
        if not isinstance(node.target, ast.Name):
            return node
        read = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = ast.copy_location(ast.BinOp(read, node.op, node.value), node)
        return ast.copy_location(ast.Assign([node.target], self._wrapped(value)), node)

    @staticmethod
    def _wrapped(value):
        return ast.Call(ast.Name(_ASSIGNED, ast.Load()), [value], [])


def _assigned(value):
    """Numbers, also those in tuples, as scalars of run time."""
    if isinstance(value, (bool, int, float)):
        return as_block(value)
    if type(value) is tuple:
        return tuple(map(_assigned, value))
    return value


@functools.lru_cache(maxsize=256)
def _compiled(source: str, path: str, first_line: int, free: tuple[str, ...]) -> types.CodeType:
    """A module with ``around(free names)``, which returns the function of ``source``."""
    tree = ast.parse(textwrap.dedent(source))
    function = _Assignments().visit(tree.body[0])
    function.decorator_list, function.returns = [], None
    function.args.defaults, function.args.kw_defaults = [], [None] * len(function.args.kwonlyargs)
    for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
        argument.annotation = None
    around = ast.parse(f"def around({', '.join(free)}): return {function.name}")
    around.body[0].body.insert(0, function)
    ast.increment_lineno(function, first_line - 1)
    return compile(ast.fix_missing_locations(around), path, "exec")


def _names(code: types.CodeType) -> set[str]:
    """Names that a function may read from its globals (and names of attributes)."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _emulated(function: types.FunctionType) -> Callable | None:
    """The emulated function for one of Triton's own; some stand in the language and in Hopper's module."""
    if not function.__module__.startswith("triton."):
        return None
    for table in (TABLES[_table(function.__module__)], TABLES["hopper"], TABLES["gl"]):
        if function.__name__ in table:
            return table[function.__name__]
    return None


def _refusal(message: str) -> Callable:
    def refuse(*args, **kwargs):
        raise NotImplementedError(message)

    return refuse
