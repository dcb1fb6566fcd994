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
}
BANNED_CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "numpy.load",
    "np.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "jinja2.Template",
    "jinja2.Environment",
}


def banned(source: str) -> list[str]:
    """What a source does that would run bytes or text of others as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in BANNED_MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS:
                found.append(name)
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
    found = {str(path): banned(path.read_text()) for path in sources}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust)",
        "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_ban_sees(source: str) -> None:
    """The control: each of these is found."""
    assert banned(source)
    assert banned("model.eval()\ntorch.loads\nf(trust_remote_code=False)") == []
