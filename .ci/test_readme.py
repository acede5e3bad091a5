"""README.md and COURSE.md keep what they say: python -m pytest .ci/test_readme.py

Every snippet and every command of both pages is run, with small data and networks.
python .ci/test_readme.py WORDS prints the README's one block of commands with them.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
if __name__ == "__main__":  # before anything is installed
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    (block,) = [block for block in blocks if sys.argv[1] in block]
    print(block, end="")
    sys.exit()

sys.path.insert(0, str(ROOT))

import pytest
import torch
from PIL import Image

import losses
import train_gan

COURSE = (ROOT / ".github/COURSE.md").read_text(encoding="utf-8")
PAGES = {"README": README, "COURSE": COURSE}
SMALL = "--z-dim 64 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu"


def found(pattern):
    """All matches in both pages, each with a name for the test's output."""
    matches = []
    for name, page in PAGES.items():
        for number, match in enumerate(re.findall(pattern, page, re.DOTALL), 1):
            matches.append(pytest.param(match, id=f"{name}-{number}"))
    return matches


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An empty folder, short epochs, few digits, and the modules as they were."""
    before = [(module, dict(vars(module))) for module in (losses, train_gan)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "argv", ["snippet.py"])
    train_gan.EPOCH_IMAGES = 64
    train_gan.DRAWN = [640, 16]
    yield
    for module, names in before:  # a snippet may put its own functions into them
        vars(module).update(names)


def run_code(code):
    if "pandas" in code:
        pytest.importorskip("pandas")
        pytest.importorskip("matplotlib")
    exec(code, {})  # noqa: S102


def snippet_with(words):
    """The one snippet of both pages that holds these words."""
    snippets = re.findall(r"```python\n(.*?)```", README + COURSE, re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if words in snippet]
    return snippet


@pytest.mark.parametrize("snippet", found(r"```python\n(.*?)```"))
def test_snippet_runs(snippet):
    if "draw_digits" in snippet or "Normal" in snippet:
        pytest.skip("it has a test of its own")
    train_gan.main([*SMALL.split(), "--dataset", "drawn", "--epochs", 1])
    run_code(snippet)


def test_heart_of_the_readme_draws_its_picture():
    run_code(snippet_with("draw_digits"))
    picture = Image.open("mine.png")
    assert picture.getextrema()[0] == (0, 255), "500 steps should make black and white"


def test_converter_writes_8_bits():
    Image.new("I;16", (2, 2), 999).save("stack.tif", save_all=True)
    sys.argv = ["convert.py", "stack.tif"]
    run_code(snippet_with("def convert"))
    assert Image.open("stack.tif_0.png").mode == "L"


def test_theory_has_the_values_of_the_text(capsys):
    run_code(snippet_with("Normal"))
    table, rows = capsys.readouterr().out.split("step    mean  deviation  loss_D\n")
    for row in table.splitlines()[1:3]:
        _, D_x, best = map(float, row.split())
        assert D_x == pytest.approx(best, abs=0.05), "D is not p / (p + q)"
    last = [float(word) for word in rows.split()[-3:]]
    assert last == pytest.approx([-1, 0.5, 1.386], abs=0.03), "G is not N(-1, 0.5)"


@pytest.mark.parametrize(
    "flags", found(r"train_gan\.py(?: (--(?!help)[^`\n|#;]+))?[`\n;]")
)
def test_command_runs(flags):
    flags = flags.replace("$seed", "3").replace("|| break", "")
    os.mkdir("my_photos")
    for n, pixels in enumerate(torch.randint(0, 256, (64, 28, 28)).byte()):
        Image.fromarray(pixels.numpy()).save(f"my_photos/{n}.png")
    train_gan.main([*SMALL.split(), "--dataset", "my_photos", "--epochs", 1])
    resumed = "--resume" in flags
    more = ["--epochs", "2"] if resumed else ["--dataset", "my_photos", "--epochs", "1"]
    train_gan.main([*flags.split(), *more, "--device", "cpu"])


# What the tutorials publish (or "ours"). All other flags have their defaults.
PLAIN = {"ema": 0, "r1": 0}
SYSTEMS = {
    "A": {
        **PLAIN,
        "g_hidden": [128, 256, 512, 1024],
        "d_hidden": [512, 256, 128],
        "lr": 1e-5,
        "beta1": 0.9,
        "epochs": 100,
    },
    "B": {
        **PLAIN,
        "z_dim": 100,
        "g_hidden": [256, 512, 1024],
        "d_hidden": [1024, 512, 256],
        "batch_norm": False,
        "dropout": 0.2,
        "g_leak": 0.01,
        "d_leak": 0.01,
    },
    "C": {"dataset": "my_photos", "label_noise": 0.1},
    "D": {
        **PLAIN,
        "g_hidden": [256, 256],
        "d_hidden": [256, 256],
        "batch_norm": False,
        "batch_size": 100,
        "lr": 2e-4,
        "beta1": 0.9,
        "epochs": 300,
    },
    "E": PLAIN,
}
DEFAULTS = {  # of the published score; A, B and D publish a slope of 0.2 in D, or theirs
    "z_dim": 64,
    "g_hidden": [256, 512],
    "d_hidden": [512, 256],
    "batch_norm": True,
    "dropout": 0.0,
    "g_leak": 0.0,
    "d_leak": 0.2,
    "loss": "non-saturating",
    "k": 1,
    "real_label": 1.0,
    "label_noise": 0.0,
    "r1": 1.0,
    "epochs": 40,
    "batch_size": 128,
    "lr": 1e-3,
    "beta1": 0.0,
    "ema": 0.9999,
    "seed": 0,
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_system_has_what_its_tutorial_publishes(system):
    (flags,) = re.findall(rf"\| {system}\. .*`python train_gan.py (.*?)`", README)
    expected = {"dataset": "auto", **DEFAULTS, **SYSTEMS[system]}
    built = vars(train_gan.parse_args(flags.split()))
    assert {name: built[name] for name in expected} == expected


@pytest.mark.parametrize("words", found(r"`(--[a-z0-9-]+ [^`]*)`"))
def test_flags_in_the_text_are_flags(words):
    train_gan.parse_args(words.replace("DATA", "data").split())


@pytest.mark.parametrize(
    "link", found(r"\]\(([^)#h][^)#]*|#[^)]+|[^)#h][^)]*#[^)]+)\)")
)
def test_link_leads_somewhere(link, request):
    name = request.node.callspec.id.split("-")[0]
    base = ROOT if name == "README" else ROOT / ".github"
    path, _, anchor = link.partition("#")
    target = base / path if path else base / f"{name}.md"
    assert target.exists(), f"no {target}"
    if anchor:
        headings = re.findall(
            r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE
        )
        anchors = [
            re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings
        ]
        assert anchor in anchors, f"no heading #{anchor} in {target.name}"
