"""jaxtyping signatures as run-time checks, put on as a package is imported.

jaxtyping's own import hook decorates closures too, anew at each call of the function around them; tracing a model
then takes nearly twice as long. Here only functions and methods that a module itself defines, and that say
something of their arguments, are decorated.
"""

import ast
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from types import CodeType

_CHECKED = "__import__('jaxtyping').jaxtyped(typechecker=__import__('beartype').beartype)"


class _Decorate(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        if node.returns or any(argument.annotation for argument in arguments):
            node.decorator_list.append(_checked(node))  # the innermost: jax.custom_vjp must stay outside of it
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        # The outermost: of a dataclass, the types of its fields, once it has become one.
        node.decorator_list.insert(0, _checked(node))
        return node


def _checked(node: ast.AST) -> ast.expr:
    decorator = ast.parse(_CHECKED, mode="eval").body
    for part in ast.walk(decorator):
        ast.copy_location(part, node)
    return decorator


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Not by way of the cache of compiled modules, which holds them without checks.
        return compile(_Decorate().visit(ast.parse(self.get_data(self.path), self.path)), self.path, "exec")


class _Finder(MetaPathFinder):
    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = tuple(packages)

    def find_spec(self, fullname, path=None, target=None):
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in self.packages):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check_signatures(packages: Iterable[str]) -> None:
    """From now on, modules of `packages` are imported with every signature checked at each call."""
    sys.meta_path.insert(0, _Finder(packages))
