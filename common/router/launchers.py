"""The launcher that a configuration asks for, and the one for processes on this machine."""

import secrets
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.http.run import ServerConfig
from common.kv_transfer.options import OF_OTHERS
from common.router.config import RouterConfig
from common.router.launching import ChildServer, GivenLauncher, Launcher
from common.router.proxy_config import shared_secret
from common.router.resources import gpu_environment, share

DEFAULT_NUM_SEQS = 256  # of an engine, where nothing is known
GRACE_SECONDS = 10.0  # beyond its own time to finish, for a replica to end


def make_launcher(module: str, engine: Any, config: RouterConfig, server: ServerConfig) -> Launcher:
    """module: what runs one engine. Raises ValueError."""
    if config.replica:
        changed = [k for k, v in asdict(engine).items() if v != getattr(type(engine)(), k)]
        if changed := [name for name in changed if name not in config.engine_fields]:
            raise ValueError(f"{changed[0]} has no effect on the servers that --replica names")
        given = GivenLauncher(config.replica, config.replica_api_key)
        given.kv_secret = shared_secret(engine, config) if config.roles else None
        return given
    if config.replica_api_key is not None:
        raise ValueError("replica_api_key is for the servers that --replica names")
    check_experts(engine, config)
    secret = secrets.token_urlsafe(32)
    own = replace(
        ServerConfig(api_key=secret),
        port=0,
        served_model_name=server.served_model_name,
        max_waiting=server.max_waiting,
        max_body_size=server.max_body_size,
        shutdown_timeout=server.shutdown_timeout,
    )
    job = {
        "engine": asdict(share(engine, config.most)),
        "server": asdict(own),
        "grace": server.shutdown_timeout + GRACE_SECONDS,
    }
    if config.launcher == "ray":
        from common.router.ray_actors import RayLauncher

        return RayLauncher(module, job, engine, config)
    environments = [gpu_environment(engine, i, config.most) for i in range(config.most)]
    if config.roles:
        launcher = RoleLauncher(module, job, environments, config.roles, asdict(type(engine)()))
        launcher.kv_secret = shared_secret(engine, config)
        return launcher
    if getattr(engine, "enable_expert_parallel", False) and config.most > 1:
        return JointLauncher(module, job, environments)
    return LocalLauncher(module, job, environments)


def check_experts(engine: Any, config: RouterConfig) -> None:
    """Raises ValueError where engines cannot share their experts as they are to be started."""
    if getattr(engine, "data_parallel_address", None) is not None:
        raise ValueError("data_parallel_address is chosen by the router for the engines it starts")
    if getattr(engine, "enable_expert_parallel", False):
        if config.most > config.least:
            raise ValueError("max_replicas: engines that share their experts are always as many")
        if config.launcher == "ray":
            raise ValueError(
                "launcher is ray: engines that share their experts are local processes"
            )


class LocalLauncher:
    """Replicas as processes on this machine."""

    def __init__(
        self, module: str, job: dict[str, Any], environments: list[dict[str, str]]
    ) -> None:
        self.module, self.job, self.environments = module, job, environments
        self.api_key: str | None = job["server"]["api_key"]
        self.children: dict[int, ChildServer] = {}  # the last of each index

    def launch(self, index: int) -> ChildServer:
        job, environment = self.job_of(index), self.environments[index]
        self.children[index] = ChildServer(self.module, job, f"engine {index}", environment)
        return self.children[index]

    def job_of(self, index: int) -> dict[str, Any]:
        return self.job

    def close(self) -> None: ...

    def kill(self) -> None:
        for child in self.children.values():
            child.kill()


class RoleLauncher(LocalLauncher):
    """Engines that differ in their role, and share a secret."""

    def __init__(
        self,
        module: str,
        job: dict[str, Any],
        environments: list[dict[str, str]],
        roles: list[str],
        defaults: dict[str, Any],
    ) -> None:
        """defaults: an engine's settings."""
        super().__init__(module, job, environments)
        self.roles, self.kv_secret, self.defaults = roles, "", defaults

    def job_of(self, index: int) -> dict[str, Any]:
        role = self.roles[index]
        own = {"role": role} | {name: self.defaults[name] for name in OF_OTHERS[role]}
        if self.job["engine"]["kv_secret_file"] is None:
            own["kv_secret"] = self.kv_secret
        return self.job | {"engine": self.job["engine"] | own}


class JointLauncher(LocalLauncher):
    """Engines that share their experts. They meet at a new place each time, and one that ends takes
    the others with it: so when one is started again, all are."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.folder = tempfile.TemporaryDirectory(prefix="engines-")  # mode 0700
        self.generation = 0
        self.launched: set[int] = set()  # of this generation

    def job_of(self, index: int) -> dict[str, Any]:
        if index in self.launched:
            self.generation += 1
            self.launched.clear()
            self.kill()  # what is left of the last one; the router starts each again
        self.launched.add(index)
        joint = {
            "data_parallel_size": len(self.environments),
            "data_parallel_rank": index,
            "data_parallel_address": str(Path(self.folder.name) / f"meet-{self.generation}"),
        }
        return self.job | {"engine": self.job["engine"] | joint}

    def close(self) -> None:
        self.folder.cleanup()


def requests_each(engine: Any, server: ServerConfig) -> int:
    """Requests that the router holds at most for each replica: those that run there and those that
    wait."""
    return server.max_waiting + (engine.max_num_seqs or DEFAULT_NUM_SEQS)
