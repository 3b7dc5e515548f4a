"""The page: complete, self-contained, sorted by its headings, and readable as a picture."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from runs import leaderboard, plots, report_methods, report_page, report_samples
from runs.cell import Data, Network, Perturb, Pruning, Training, Verifier, settings
from runs.execute import Execute
from runs.progress import Silent
from runs.report_style import SCRIPT, STYLE
from runs.store import Record, Store
from tests.runs.handmade import make_cell, make_failure, make_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BITS = {"dense": "1100000000", "imp": "1111100000", "magnitude": "1110000000"}
VOID = ("meta", "img", "br")


@pytest.fixture
def records() -> list[Record]:
    made = []
    for method, bits in BITS.items():
        for seed in range(3):
            record = make_record(make_cell(method, 0.5 * (method != "dense"), seed), bits, clean=0.7 + seed / 10)
            record["mask"] = {"structured": False, "density": 0.5, "layers": {"fc1.weight": 0.4 + seed / 10}}
            made.append(record)
    return [*made, make_failure()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """A results folder of two real cells, each under a perturbation with a parameter and one without."""
    folder = tmp_path_factory.mktemp("results")
    store = Store(folder)
    work = Execute.on("cpu", threads=1, data_dir=None, store=store)
    made = []
    for method, ratio in (("dense", 0.0), ("magnitude", 0.5)):
        cell = make_cell(
            method, ratio, perturbations=(Perturb("brightness", 0.2), Perturb("linf", 0.05)), images=8,
            training=Training("natural", epochs=2, settings=settings(lr=0.003)),
        )  # fmt: skip
        with store.slot(cell).lock() as slot:
            made.append(slot.write_record(work(cell, slot, Silent())))
    return folder, made


@pytest.fixture(scope="module")
def page(ran: tuple[Path, list[Record]]) -> str:
    """The page of these two cells."""
    folder, records = ran
    return build(records, folder)


class Page(HTMLParser):
    """Checks that every tag is closed, and keeps what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.images_without_text = 0
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [given["id"] or ""] if "id" in given else []
        self.images_without_text += tag == "img" and not given.get("alt")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def build(records: list[Record], folder: Path) -> str:
    return report_page.make(leaderboard.build(records), records, folder)


def test_it_is_well_formed_and_needs_nothing_from_elsewhere(records: list[Record], tmp_path: Path) -> None:
    text = build(records, tmp_path)
    page = Page(text)
    pictures = [source for source in page.sources if source.startswith("data:")]
    assert len(pictures) == 4
    for source in pictures:
        assert source.startswith("data:image/svg+xml;base64,")
        assert ElementTree.fromstring(base64.b64decode(source.partition(",")[2])).tag.endswith("svg")
    anchors = [source for source in page.sources if source not in pictures]
    assert {anchor.removeprefix("#") for anchor in anchors} == set(page.ids)
    assert page.images_without_text == 0
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"data:image/svg\+xml;base64,[^\"]*", "", text))
    assert "default-src 'none'" in text
    assert "torch" in page.words
    assert "2.15" in page.words


def test_what_errors_say_is_escaped(tmp_path: Path) -> None:
    failure = make_failure()
    failure["error"]["message"] = "<script>alert(1)</script> & more"
    text = build([failure], tmp_path)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    Page(text)


def test_cells_carry_what_they_are_sorted_by(records: list[Record], tmp_path: Path) -> None:
    text = build(records, tmp_path)
    (table,) = leaderboard.build(records)
    verified = [row.verified.mean for row in table.rows if row.verified is not None]
    found = re.findall(r"<td data-v=\"([^\"]*)\">[\d.]+ ±[\d.]+ \[", text)
    assert list(map(float, found)) == verified
    assert text.count('class="sortable"') == 1


def test_methods_show_settings_masks_and_unstable_relus(records: list[Record], tmp_path: Path) -> None:
    pages = report_methods.pages(records, tmp_path)
    assert [page.name for page in pages] == ["dense", "imp", "magnitude"]
    (setup,) = pages[1].setups
    assert setup.where == "digits · mlp"
    assert ("epochs", "2") in setup.common
    assert setup.differing == ()
    (kept,) = setup.kept
    assert kept.label == "50 % · natural"
    assert kept.layers == {"fc1.weight": pytest.approx(0.5)}  # the mean of .4, .5 and .6
    assert setup.unstable["50 % · natural"]["linf 0.1"].mean == 12.0
    assert setup.histories == {}  # no files there
    words = " ".join(Page(build(records, tmp_path)).words)
    for needed in ("Method: imp", "fc1.weight", "batch size", "Unstable ReLUs per image"):
        assert needed in words


def test_settings_that_differ_are_told_apart(tmp_path: Path) -> None:
    def cell(seed: int, rounds: int) -> Record:
        own = settings(rounds=rounds, scope="global")
        return make_record(make_cell(seed=seed, pruning=Pruning("imp", 0.5, own)), "1100000000")

    (page,) = report_methods.pages([cell(0, 2), cell(1, 3)], tmp_path)
    (setup,) = page.setups
    assert ("method: scope", "global") in setup.common
    assert [own for _, own in setup.differing] == [(("method: rounds", "2"),), (("method: rounds", "3"),)]


def test_curves_are_read_once_a_training(ran: tuple[Path, list[Record]]) -> None:
    folder, records = ran
    dense, magnitude = report_methods.pages(records, folder)
    (seeds,) = dense.setups[0].histories.values()
    assert len(seeds) == 1
    assert [row["epoch"] for row in seeds[0]] == [0, 1]
    assert set(magnitude.setups[0].histories) == {"50 % · natural"}
    again = report_methods.pages([records[0], records[0]], folder)
    (seeds,) = again[0].setups[0].histories.values()
    assert len(seeds) == 1
    drawn = plots.curves(dense.setups[0].histories)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_curves_without_a_validation_set_are_drawn() -> None:
    rows = [{"metrics": {"loss": 1.0 / (1 + i)}, "validation": {}} for i in range(3)]
    assert ElementTree.fromstring(plots.curves({"a": [rows, rows], "b": [rows]})).tag.endswith("svg")


def test_samples_show_the_worst_member_of_the_set(ran: tuple[Path, list[Record]]) -> None:
    import datasets
    import models

    folder, records = ran
    tables = leaderboard.build(records)
    bright, linf = report_samples.strips(tables, records, folder)
    assert bright.table.perturbation.kind == "brightness"
    assert bright.indices == tuple(range(report_samples.IMAGES))
    pack = datasets.load("digits", None, "test", limit=8)
    x, y = pack.tensors()
    assert bright.truth == tuple(pack.classes[label] for label in y[:6])
    first = Image.open(io.BytesIO(bright.originals[0]))
    assert torch.equal(torch.tensor(list(first.getdata())).reshape(8, 8), (x[0, 0] * 255).round().long())
    label, samples = bright.networks[0]
    assert label == "dense 0 · natural · seed 0"
    model = models.load(folder / records[0]["key"] / "model.safetensors")
    for i, sample in enumerate(samples):
        # An oracle of its own: a finer grid has no member that is much worse.
        t = torch.linspace(-0.2, 0.2, 401)
        with torch.no_grad():
            out = model((x[i] + t.reshape(-1, 1, 1, 1)).clamp(0, 1))
            assert sample.at is not None
            there = model((x[i : i + 1] + sample.at[0]).clamp(0, 1))[0]
        rest = [k for k in range(10) if k != int(y[i])]
        margins = out[:, y[i]] - out[:, rest].amax(1)
        slack = 0.05 * (1 + float(margins.abs().max()))
        assert float(there[y[i]] - there[rest].max()) <= float(margins.min()) + slack
        assert sample.verdict != "holds" or float(margins.min()) >= (sample.lower or 0.0) > 0
        assert sample.verdict != "violated" or float(margins.min()) <= 0
        assert sample.wrong == (float(margins[200]) < 0)
    assert all(sample.at is None and sample.picture is None for _, own in linf.networks for sample in own)


def test_samples_of_other_images_are_left_out(ran: tuple[Path, list[Record]]) -> None:
    folder, records = ran
    foreign = []
    for record in records:
        data = {**record["data"], "fingerprints": {**record["data"]["fingerprints"], "test": "another"}}
        foreign.append({**record, "data": data})
    assert report_samples.strips(leaderboard.build(foreign), foreign, folder) == []


def test_samples_without_the_data_set_say_so(tmp_path: Path) -> None:
    cell = make_cell(data=Data("fashion_mnist"))
    record = make_record(cell, "1100000000")
    store = Store(tmp_path)
    with store.slot(cell).lock() as slot:
        slot.append_examples([
            {"perturbation": "linf 0.1", "index": i, "status": "holds", "lower": 0.5, "clean": 1.0} for i in range(2)
        ])  # fmt: skip
    (strip,) = report_samples.strips(leaderboard.build([record]), [record], tmp_path, tmp_path / "nothing")
    assert strip.originals == ()
    assert strip.networks[0][1] == (report_samples.Sample("holds", 0.5),) * 2
    assert "not at hand" in " ".join(Page(build([record], tmp_path)).words)


def test_keypoints_take_their_worst_parameter_from_the_record(tmp_path: Path) -> None:
    cell = make_cell(
        data=Data("digits"), network=Network("mlp"), perturbations=(Perturb("brightness", 0.1),),
        verifier=Verifier("deviation", images=2),
    )  # fmt: skip
    record = make_record(cell, "11", task="keypoints")
    import datasets

    fingerprint = datasets.load("digits", None, "test", limit=2).fingerprint
    record["data"]["fingerprints"]["test"] = fingerprint
    with Store(tmp_path).slot(cell).lock() as slot:
        slot.append_examples([
            {"perturbation": "brightness 0.1", "index": i, "status": "holds", "lower": 0.5, "clean": 2.0,
             "data": fingerprint, "deviation_at": [0.1 - 0.2 * i]} for i in range(2)
        ])  # fmt: skip
    (strip,) = report_samples.strips(leaderboard.build([record]), [record], tmp_path)
    (first, second) = strip.networks[0][1]
    assert (first.at, second.at) == ((pytest.approx(0.1),), (pytest.approx(-0.1),))
    lighter, darker = (Image.open(io.BytesIO(one.picture or b"")) for one in (first, second))
    plain = [sum(Image.open(io.BytesIO(png)).getdata()) for png in strip.originals]
    assert sum(lighter.getdata()) > plain[0]
    assert sum(darker.getdata()) < plain[1]
    assert "t = +0.1" in "".join(Page(build([record], tmp_path)).words)


def test_colours_of_the_page_have_contrast() -> None:
    """WCAG 2: at least 4.5 to 1 on white for every colour of text, and the bars 3 to 1 on their ground."""

    def luminance(colour: str) -> float:
        digits = colour * 2 if len(colour) == 3 else colour
        if len(colour) == 3:
            digits = "".join(2 * c for c in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    texts = re.findall(r"[;{]color:#([0-9a-f]{6}|[0-9a-f]{3})\b", STYLE)
    assert len(texts) >= 6
    assert all(1.05 / (luminance(colour) + 0.05) >= 4.5 for colour in texts)
    assert (luminance("eee") + 0.05) / (luminance("0072b2") + 0.05) >= 3
    assert "@media print" in STYLE


# --- in a browser ---------------------------------------------------------------------------------------------------
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


def look(page: str, folder: Path, script: str, width: int = 1280) -> dict[str, object]:
    """What ``script`` (JavaScript, fills the object ``out``) finds on the page in headless Chromium."""
    probe = f"<script>addEventListener('load', () => {{ const out = {{}}; {script}; const pre = document.createElement('pre'); pre.id = 'probe'; pre.textContent = JSON.stringify(out); document.body.append(pre); }})</script>"  # noqa: E501
    path = folder / "page.html"
    path.write_text(page.replace("</body>", probe + "</body>"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'<pre id="probe">(.*?)</pre>', found, flags=re.S)
    assert match is not None, found[-2000:]
    content: dict[str, object] = json.loads(match[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    return content


SORTING = """
const table = document.querySelector("table.sortable");
const column = (name) => Array.from(table.tHead.rows[0].cells).findIndex((cell) => cell.textContent.startsWith(name));
const order = () => Array.from(table.tBodies[0].rows).map((row) => row.cells[0].textContent);
const press = (name) => { const b = table.tHead.rows[0].cells[column(name)].querySelector("button"); b.focus();
  out.focused = document.activeElement === b; b.click(); };
out.before = order();
press("Clean"); out.clean = order(); out.state = table.tHead.rows[0].cells[column("Clean")].getAttribute("aria-sort");
press("Clean"); out.again = order();
press("Method"); out.methods = order();
out.first = table.tHead.rows[0].cells[column("Clean")].getAttribute("aria-sort");
out.said = document.querySelector("[aria-live]").textContent;
out.tab = Array.from(table.querySelectorAll("th button")).every((b) => b.tabIndex === 0)
"""


@browser
def test_headings_sort_in_chromium(tmp_path: Path) -> None:
    rows = (("dense", 0.0, 0.95), ("imp", 0.5, 0.8), ("taylor", 0.5, 1.0))
    records = [make_record(make_cell(m, r), "1100000000", clean=c) for m, r, c in rows] + [make_failure()]
    found = look(build(records, tmp_path), tmp_path, SORTING)
    assert found["before"] == ["dense", "imp", "taylor", "magnitude"]
    assert found["clean"] == ["taylor", "dense", "imp", "magnitude"]  # 1 before .95: as numbers, not as text
    assert found["state"] == "descending"
    assert found["again"] == ["imp", "dense", "taylor", "magnitude"]  # what has no number stays last
    assert found["methods"] == ["dense", "imp", "magnitude", "taylor"]
    assert found["first"] == "none"
    assert found["said"] == "Sorted by Method, ascending."
    assert found["focused"] is True
    assert found["tab"] is True


LAYOUT = """
out.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
out.pictures = Array.from(document.images).filter((image) => image.naturalWidth === 0).length;
out.count = document.images.length;
const parts = Array.from(document.querySelectorAll("h2, h3, table, figure, p.sub"));
const boxes = parts.map((part) => part.getBoundingClientRect());
out.empty = boxes.filter((box) => box.height < 8 || box.width < 8).length;
out.left = boxes.filter((box) => box.left < 0).length;
const bar = document.querySelector(".bar"), fill = bar.querySelector("i");
out.bar = fill.getBoundingClientRect().width / bar.getBoundingClientRect().width;
out.fetched = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length
"""


@browser
@pytest.mark.parametrize("width", [1280, 500])
def test_layout_in_chromium(ran: tuple[Path, list[Record]], page: str, tmp_path: Path, width: int) -> None:
    found = look(page, tmp_path, LAYOUT, width)
    assert found["wide"] == 0  # tables scroll in their own boxes
    assert found["pictures"] == 0
    # Four plots, a figure a method, and in the samples one row of originals a table and two rows of worst members.
    assert found["count"] == 4 + 2 + 6 * (2 + 2)
    assert (found["empty"], found["left"], found["fetched"]) == (0, 0, 0)
    verified = leaderboard.build(ran[1])[0].rows[0].verified
    assert verified is not None
    assert found["bar"] == pytest.approx(verified.mean, abs=0.02)


@browser
def test_it_prints_on_landscape_paper(page: str, tmp_path: Path) -> None:
    path, sheet = tmp_path / "page.html", tmp_path / "page.pdf"
    path.write_text(page)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        f"--print-to-pdf={sheet}", path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    content = sheet.read_bytes()
    assert content.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert boxes
    assert all(float(wide) > float(high) for wide, high in boxes)  # landscape, as the style asks for


def test_style_and_script_cannot_end_their_element() -> None:
    assert "</" not in SCRIPT + STYLE
