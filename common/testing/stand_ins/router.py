"""Part 10's router over stand-ins that its launchers start: for tests of starting, ending and scaling."""

from common.router.run import run
from common.testing.parts import module_of


def main() -> None:
    run(
        module_of(10, "router").Router,
        module_of(10, "replicas").ReplicaSet,
        module_of(10, "config").EngineConfig,
        "common.testing.stand_ins",
        __doc__ or "",
    )


if __name__ == "__main__":
    main()
