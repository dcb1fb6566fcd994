"""Who may import whom: a part its own files, relatively, and `common`; never another part. `common` imports no part.

Relative imports are what lets a file stay byte-identical from part to part, and a part run under either of its names.
"""

import ast
import functools
import re
import sys
from pathlib import Path

from common.chapters.chain import Part

PART_NAME = re.compile(r"part\d\d(?:_\w+)?")


@functools.cache
def find_imports(content: bytes) -> tuple[tuple[int, int, str, bool], ...]:
    """(line, number of leading dots, dotted name, is dynamic) of every import. Cached: most files have many copies."""
    found = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.lineno, node.level, module, False) for module in modules]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            name = node.args[0].value
            if function in {"import_module", "__import__", "run_module"} and isinstance(name, str):
                dots = len(name) - len(name.lstrip("."))
                found.append((node.lineno, dots, name.lstrip("."), True))
    return tuple(found)


def check_imports(part: Part, chain: dict[str, bytes]) -> list[str]:
    """A part imports its own files relatively, and never another part."""
    own = {Path(name).parts[0].removesuffix(".py") for name in chain if name.endswith(".py")}
    own -= sys.stdlib_module_names
    errors = []
    for name, content in chain.items():
        if not name.endswith(".py"):
            continue
        try:
            imports = find_imports(content)
        except (SyntaxError, ValueError) as error:
            errors.append(f"{part.folder.name}/{name}: not valid Python ({error})")
            continue
        for line, dots, module, _ in imports:
            where = f"{part.folder.name}/{name}:{line}"
            top = module.split(".")[0]
            if dots > name.count("/") + 1:
                errors.append(
                    f"{where}: the import of {'.' * dots}{module} leaves the part; take it from common"
                )
            elif dots == 0 and top in {part.package, part.folder.name}:
                errors.append(f"{where}: imports its own {module}; write it as a relative import")
            elif dots == 0 and PART_NAME.fullmatch(top):
                errors.append(f"{where}: imports {module}; a part never imports another part")
            elif dots == 0 and top in own:
                errors.append(f"{where}: imports its own {module} absolutely; write `.{module}`")
    return errors


def check_common(root: Path) -> list[str]:
    """`common` serves every part, so it imports none; a part is loaded by name at run time where that is the job."""
    errors = []
    for path in sorted((root / "common").rglob("*.py")):
        where = path.relative_to(root).as_posix()
        try:
            imports = find_imports(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            errors.append(f"{where}: not valid Python ({error})")
            continue
        for line, _, module, dynamic in imports:
            if not dynamic and PART_NAME.fullmatch(module.split(".")[0]):
                errors.append(
                    f"{where}:{line}: imports {module}; common imports no part, load it by name at run time"
                )
    return errors
