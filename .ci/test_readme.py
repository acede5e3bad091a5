"""README.md and COURSE.md keep what they say: python -m pytest .ci/test_readme.py

Every snippet and every command of both pages is run, with small data and networks.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import losses
import train_gan

README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    for module, names in before:
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
    train_gan.main([*SMALL.split(), "--dataset", "drawn", "--epochs", "1"])
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
    "flags", found(r"train_gan\.py(?: (--(?!help)[^`\n|#]+))?[`\n]")
)
def test_command_runs(flags):
    os.mkdir("my_photos")
    for n, pixels in enumerate(torch.randint(0, 256, (64, 28, 28)).byte()):
        Image.fromarray(pixels.numpy()).save(f"my_photos/{n}.png")
    train_gan.main([*SMALL.split(), "--dataset", "my_photos", "--epochs", "1"])
    resumed = "--resume" in flags
    more = ["--epochs", "2"] if resumed else ["--dataset", "my_photos", "--epochs", "1"]
    train_gan.main([*flags.split(), *more, "--device", "cpu"])


WIDTHS = {  # length of z, units of G and of D, as the tutorials publish them
    "A": [64, [128, 256, 512, 1024], [512, 256, 128]],
    "B": [100, [256, 512, 1024], [1024, 512, 256]],
    "D": [64, [256, 256], [256, 256]],
}


@pytest.mark.parametrize("system", ["A", "B", "C", "D", "E"])
def test_system_has_the_widths_of_its_tutorial(system):
    (flags,) = re.findall(rf"\| {system}\. .*`python train_gan.py (.*)`", README)
    args = train_gan.parse_args(flags.split())
    built = [args.z_dim, args.g_hidden, args.d_hidden]
    assert built == WIDTHS.get(system, built)


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


@pytest.mark.parametrize("name", ["models", "losses", "train_gan"])
def test_readme_counts_the_lines_of_the_file(name):
    lines = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert f"| `{name}.py` | {lines} |" in README


def test_pages_are_short():
    assert len(README.splitlines()) <= 280
    assert len(README.split()) <= 1800
    assert len(COURSE.split()) <= 3600
