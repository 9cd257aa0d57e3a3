"""The self-contained page: what stands in it, and that a browser shows it."""

import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from simmim.base.files import UNFINISHED
from simmim.commands.report import (
    REPORT,
    Curve,
    Curves,
    Flow,
    Page,
    Picture,
    Table,
    Text,
    report_run,
    write_page,
)
from simmim.commands.report.run_report import (
    best_and_last,
    choose_diagrams,
    commands,
    read_metrics,
    series_of,
)
from support.commands import refused, simmim

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None and "CI" not in os.environ,  # CI installs one, and fails without
    reason="no Chromium on this machine",
)


class Reader(HTMLParser):
    """Tags that were opened and never closed, and addresses that are asked for."""

    VOID = frozenset({"meta", "input", "img", "br", "path", "use", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def png(path: Path, shade: int = 0) -> Path:
    Image.new("RGB", (8, 4), (shade, 0, 0)).save(path)
    return path


@pytest.fixture
def page(tmp_path: Path) -> Path:
    pictures = [Picture(png(tmp_path / f"{i}.png", i), f"after {i} epochs") for i in range(3)]
    curves = [Curve("a & b", range(2000), np.linspace(0, 1, 2000).tolist())]
    parts = [
        Flow(pictures),
        Table(["<metric>", "value"], [["val/loss", 0.123456], ["images", 12345]]),
        Curves([("loss <1>", curves)]),
        Text("simmim --x '<y>'", verbatim=True),
        Text("hidden", folded="more"),
    ]
    return write_page(Page("<b>name</b>", "a < b", [("Part", parts)]), tmp_path / REPORT)


def test_it_is_one_escaped_file_of_closed_tags_that_asks_for_no_other(page: Path) -> None:
    text = page.read_text()
    reader = Reader(text)
    assert reader.open == []
    assert len([a for a in reader.addresses if a.startswith("data:image/png;base64,")]) == 3
    assert all(a.startswith(("data:", "#")) for a in reader.addresses)
    assert "<b>name" not in text
    for shown in (
        "&lt;b&gt;name&lt;/b&gt;",
        "simmim --x &#x27;&lt;y&gt;&#x27;",
        "0.1235",
        "12,345",
    ):
        assert shown in text
    for told in (  # to those who cannot see pictures and diagrams
        '<img alt="Part, after 2 epochs"',
        'role="img" aria-label="loss &lt;1&gt;. a &amp; b: 0 to 1"',
        'aria-label="Part: which picture"',
    ):
        assert told in text
    assert [p.name for p in page.parent.iterdir() if p.suffix == UNFINISHED] == []


def test_a_diagram_names_its_curves_in_their_colours(tmp_path: Path) -> None:
    curves = [Curve(f"class {i}", [0, 1], [i, i + 1]) for i in range(12)]
    parts = [Curves([("each", curves), ("one", curves[:1])])]
    text = write_page(Page("p", "", [("Part", parts)]), tmp_path / REPORT).read_text()
    keys = re.findall(r'background:(#\w{6})"></i>(class \d+)', text)
    assert [name for _, name in keys] == [curve.name for curve in curves]
    assert len({colour for colour, _ in keys}) == 12
    assert all(f"stroke: {colour}" in text for colour, _ in keys)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_one_picture_of_a_series_dark_where_the_screen_is(
    page: Path, dark: bool
) -> None:
    dom, errors = browse(page)
    figures = re.search(r'<div class="flow">.*?</div>', dom, re.DOTALL)
    assert figures is not None
    hidden = ['hidden=""' in tag for tag in re.findall(r"<figure[^>]*>", figures[0])]
    assert hidden == [True, True, False]
    assert "CONSOLE" not in errors
    shot = page.with_name("shot.png")
    browse(page, f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={int(not dark)}")
    pixels = np.asarray(Image.open(shot).convert("L"))
    paper, ink = np.median(pixels), (pixels.min() if np.median(pixels) > 127 else pixels.max())
    assert (paper < 64) == dark
    assert abs(float(paper) - float(ink)) > 150


@pytest.mark.slow
@needs_browser
def test_on_a_phone_what_is_wide_scrolls_and_the_page_does_not(tmp_path: Path) -> None:
    Image.new("RGB", (900, 50)).save(tmp_path / "wide.png")
    picture = Picture(tmp_path / "wide.png", "w" * 100)
    parts = [
        picture,
        Flow([picture, picture]),
        Table([f"column {i}" for i in range(12)], [range(12)]),
        Table(["", ""], [("name", "value " * 50)]),
        Curves([("loss " * 20, [Curve("x", [0, 1], [0, 1])])]),
        Text("simmim " * 50, verbatim=True),
    ]
    page = write_page(Page("p" * 100, "a lead " * 20, [("Part", parts)]), tmp_path / REPORT)
    phone = tmp_path / "phone.html"
    phone.write_text(
        f'<iframe id="phone" width="360" height="700" srcdoc="{escape(page.read_text())}"></iframe>'
        """<script>
        phone.onload = () => {
          const { scrollWidth, clientWidth } = phone.contentDocument.documentElement;
          document.body.dataset.widths = `${scrollWidth} of ${clientWidth}`;
        };
        </script>"""
    )
    dom, _ = browse(phone)
    widths = re.search(r'data-widths="(\d+) of (\d+)"', dom)
    assert widths is not None
    assert widths[1] == widths[2]


def browse(page: Path, *options: str) -> tuple[str, str]:
    """The page as a headless browser has it after its script, and what the browser complains of."""
    assert BROWSER is not None
    profile = page.parent / "profile"
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "enable-logging=stderr"]
    flags += [f"disable-{name}" for name in ("background-networking", "component-update", "sync")]
    flags += [f"user-data-dir={profile}"]
    words = [BROWSER, *(f"--{flag}" for flag in flags), *(options or ["--dump-dom"]), page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout, done.stderr


LAYERS = "attention/entropy_12,attention/entropy_2"
CSV = f"""step,epoch,train/loss,val/loss,val/knn_top1,lr,val/avg_dist,best/loss,{LAYERS}
0,,,,0.25,,,,,
1,0,1.0,,,0.1,,,0.7,0.9
1,0,,0.8,0.5,,15,0.8,,
3,1,0.6,,,0.05,,,0.6,0.8
3,1,,0.9,nan,,15,0.8,,
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine" / "version_3"
    (folder / "reconstructions").mkdir(parents=True)
    for epoch in range(0, 300, 10):
        png(folder / "reconstructions" / f"epoch_{epoch:04d}.png")
    (folder / "metrics.csv").write_text(CSV)
    config = {"name": "mine", "model": {"encoder": "vit"}, "reconstructions": {"num_images": 8}}
    config["data"] = {"root": "my images"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_metrics_are_read_without_gaps_and_drawn_where_they_change(run: Path) -> None:
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["val/knn_top1"] == ([0, 1], [0.25, 0.5])  # what is no number is left out
    rows = {row[0]: row[1:] for row in best_and_last(metrics)}
    # The best loss is the least, the best accuracy the greatest.
    assert rows == {"val/loss": (0.8, 0.8, 1, 0.9), "val/knn_top1": (0.25, 0.5, 1, 0.5)}
    diagrams = {
        title: [(c.name, list(c.y)) for c in curves] for title, curves in choose_diagrams(metrics)
    }
    assert diagrams["loss"] == [("train/loss", [1.0, 0.6]), ("val/loss", [0.8, 0.9])]
    layers = diagrams["attention: entropy by layer (1: on all alike)"]
    assert layers == [("2", [0.9, 0.8]), ("12", [0.7, 0.6])]
    assert not any("avg_dist" in title or "best" in title for title in diagrams)


def test_of_many_pictures_a_dozen_is_shown_from_first_to_last(run: Path) -> None:
    captions = [picture.caption for picture in series_of(run)["Reconstructions"]]
    assert len(captions) == 12
    assert (captions[0], captions[-1]) == ("before training", "after 290 epochs")


def test_commands_name_the_run_and_quote_its_folder(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert commands(run, config).startswith("# no checkpoint yet")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    said = commands(run, config)
    assert "simmim pretrain fit --name mine --ckpt_path last" in said
    assert "--data.root 'my images'" in said
    assert f"simmim compare --weights {run}" in said


def test_a_report_at_any_time_of_a_run(run: Path) -> None:
    assert "Always the same: val/avg_dist" not in report_run(run).read_text()
    lines = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("\n".join(lines[:4]) + "\n")  # the first epoch
    text = report_run(run).read_text()
    assert "Always the same" not in text  # of what was logged once
    assert "2 steps, 1 epoch. At the end: val/loss 0.8" in text
    (run / "metrics.csv").unlink()
    text = report_run(run, "Failed: the loss became < 0.").read_text()
    assert '<p class="lead">Failed: the loss became &lt; 0.\n' in text
    assert "Nothing has been logged yet." in text


DIGITS = "pretrain fit -c digits --trainer.max_epochs=2 --probe.every_n_epochs=0"
ONE_BLOCK = "--model.encoder_kwargs={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 1}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_fails_says_so_in_its_report(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.base_lr=1e38", "--model.warmup_epochs=0", "--trainer.logger=false"]
    refused(capsys, DIGITS, ONE_BLOCK, "--trainer.limit_train_batches=4", *options, status=1)
    text = Path("runs/digits/version_0", REPORT).read_text()
    assert re.search(r'class="lead">Failed: [^<]* not a number at step \d[^<]*simmim doctor', text)


@pytest.mark.slow
def test_fit_ends_with_a_report(workdir: Path) -> None:
    simmim(DIGITS, ONE_BLOCK, "--trainer.limit_train_batches=2", "--trainer.logger=true")
    path = Path("runs/digits/version_0", REPORT).absolute()
    text = path.read_text()
    for part in ("Results", "Reconstructions", "Curves", "Go on", "How it was made", "val/loss"):
        assert part in text
    assert "after 2 epochs" in text
    if BROWSER is None:
        return
    dom, errors = browse(path)
    assert "CONSOLE" not in errors
    for title in ("Reconstructions", "Reconstructed worst"):  # each shows one picture
        section = re.search(rf"<h2>{title}</h2>.*?</section>", dom, re.DOTALL)
        assert section is not None
        assert len(re.findall(r"<figure(?! hidden)[^>]*>", section[0])) == 1, title
