"""Which kernels Triton compiles, or loads from its folder on disk, in this process."""

from typing import Any


class Variants:
    """A kernel with other constants, other number formats or another alignment is another variant."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def note(self) -> None:
        """Note from now on each variant that this process uses for the first time."""
        from triton import knobs

        knobs.runtime.jit_cache_hook = self.hook

    def hook(self, *_: Any, **about: Any) -> None:
        """Triton calls it before it looks for a variant on disk. None: go on."""
        compiled = about.get("compile") or {}
        constants = list((compiled.get("constants") or {}).values())
        kinds = list((compiled.get("signature") or {}).values())
        kinds = [kind for kind in kinds if kind != "constexpr"]
        name = getattr(about.get("fn"), "name", about.get("fn"))
        self.names.append(f"{name}({', '.join(map(str, kinds))}; {constants})")
