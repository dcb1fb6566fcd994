"""Nothing here runs the bytes or the text of others: what would is banned from the sources."""

import ast

import pytest

from common.testing.parts import ROOT

BANNED_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "multiprocessing",  # its queues, pipes and managers load pickles
    "torch.multiprocessing",
    "concurrent.futures.process",
    "socketserver",
    "xmlrpc",
    "runpy",
}
BANNED_CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "torch.serialization",
    "numpy.load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "concurrent.futures.ProcessPoolExecutor",
    "asyncio.create_subprocess_shell",
    "importlib.util.spec_from_file_location",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.distributed.broadcast_object_list",
    "torch.distributed.all_gather_object",
    "torch.distributed.gather_object",
    "torch.distributed.scatter_object_list",
    "torch.distributed.send_object_list",
    "torch.distributed.recv_object_list",
    "yaml.load",
    "jinja2.Template",
    "jinja2.Environment",
}


def is_banned(name: str) -> bool:
    """Whether a dotted name is banned, or of a module that is."""
    parts = name.removeprefix("builtins.").split(".")
    starts = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return bool(starts & (BANNED_MODULES | BANNED_CALLS))


def banned(source: str) -> list[str]:
    """What a source does that would run bytes or text of others as code."""
    found: list[str] = []
    tree = ast.parse(source)
    meant: dict[str, str] = {}  # a name in this source -> what it was imported as
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            is_from = isinstance(node, ast.ImportFrom)
            module = "." * node.level + (node.module or "") + "." if is_from else ""
            for alias in node.names:
                name = module + alias.name
                found += [name] if is_banned(name) else []
                first = alias.name.split(".")[0]
                meant[alias.asname or first] = name if alias.asname or is_from else first
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            name = meant.get(first, first) + dot + rest
            found += [name] if is_banned(name) and (first in meant or not dot) else []
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if keyword.arg in ("trust_remote_code", "shell", "allow_pickle"):
                    found += [f"{keyword.arg}={value}"] if value != "False" else []
    return found


def test_nothing_runs_the_bytes_of_others() -> None:
    sources = [
        path
        for folder in [ROOT / "common", *ROOT.glob("part[0-9][0-9]_*")]
        for path in folder.rglob("*.py")
    ]
    assert len(sources) > 20
    found = {str(path.relative_to(ROOT)): banned(path.read_text()) for path in sources}
    found = {path: sorted(set(names)) for path, names in found.items() if names}
    # numba's form for compiled kernels: machine code, in a folder of the user's own, written by this
    # code alone. Whoever can write there runs code with or without pickle.
    assert found.pop("common/kernels/cpu/cache.py") == ["pickle", "pickle.loads"]
    # Tests' own processes, forked from one that has imported everything: a pipe to a child of ours.
    forked = found.pop("common/testing/transfer_worker.py")
    assert all(name.startswith("multiprocessing") for name in forked)
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os.path, pickle as p",
        "from torch import load",
        "from torch import load as open_file",
        "import torch as t\nt.load(path)",
        "import torch\nread = torch.load",
        "import torch\ntorch.serialization.load(path)",
        "import numpy as any_name\nany_name.load(path)",
        "from os import system",
        "from os import path, popen as p",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import exec as run",
        "run = eval",
        "import multiprocessing",
        "from multiprocessing.connection import Client",
        "import multiprocessing.shared_memory as memory",
        "from torch import multiprocessing",
        "import torch.multiprocessing as mp",
        "from concurrent.futures import ProcessPoolExecutor",
        "import torch.distributed as dist\ndist.broadcast_object_list(objects)",
        "from pickle import loads",
        "def f():\n    import dill",
        "import torch\ntorch.load(path)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust)",
        "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_ban_sees(source: str) -> None:
    """The control: each of these is found."""
    assert banned(source)
    harmless = (
        "import torch, json\nmodel.eval()\ntorch.loads\nf(trust_remote_code=False)\njson.load(f)"
    )
    assert banned(harmless) == []
    assert (
        banned("from .pickle import load\nfrom common.http.metrics_routes import render\nload(x)")
        == []
    )
