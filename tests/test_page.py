"""The page: what it holds, and what it does in a real browser, which is skipped where there is no Chromium."""

import base64
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sdcl.scoring import charts, viewer
from sdcl.scoring.charts import binned, bland_altman, inked
from sdcl.scoring.comparison import VOLUMES, Entry, make_rows, scores_of
from sdcl.scoring.evaluation import Case, Task
from sdcl.scoring.figures import save_figure
from sdcl.scoring.matrix_page import Compared, ranked
from sdcl.scoring.page import Page, embedded, sections_of, svg_of, write_page
from sdcl.scoring.viewer import Shown, read_viewer

HOSTILE = ["</script><img src=x onerror=alert(1)>", "a\"'&<b>$x$", "plain"]
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}


def boxes(shape, *places):
    volume = np.zeros(shape, np.uint8)
    for label, place in enumerate(places, start=1):
        volume[place] = label
    return volume


def case_of(name, shift=0, shape=(12, 10, 8), spacing=(1.0, 1.0, 2.0)):
    """A case whose reference is a box of each class, whose student b is it, and whose student a misses one voxel."""
    x = slice(2 + shift, 6 + shift)
    reference = boxes(shape, np.s_[x, 2:5, 2:6], np.s_[x, 6:8, 3:5])
    a = reference.copy()
    a[2 + shift, 2, 2] = 0
    image = np.linspace(0, 1, reference.size, dtype=np.float32).reshape(shape)
    return Case(name, image, reference, spacing), {"student_a": a, "student_b": reference, "mean": reference}


@pytest.fixture
def shown():
    return [Shown(f"{name}, Dice 1.000", *case_of(name, shift=k)) for k, name in enumerate(HOSTILE)]


def task(planes=(2, 1, 0), names=("one", "two")):
    return Task("t", names, None, planes=planes)


def entry(method="sdcl", predictor="mean", gain=0.0, seeds=(1,), structures=("one", "two")):
    def rows(seed):
        return [
            {"structure": s, "case": name, "empty": False, "dice": 0.5 + gain + 0.1 * k + 0.01 * seed, "jaccard": 0.4,
             "hd95": 3.0, "asd": 1.0, "hd95_mm": 3.0, "asd_mm": 1.0, "voxels": 1000 + 100 * k, "reference_voxels": 1000,
             "ml": 1 + 0.1 * k, "reference_ml": 1.0}
            for k, name in enumerate(HOSTILE) for s in structures
        ]  # fmt: skip

    found = {seed: scores_of(rows(seed)) for seed in seeds}
    scores, empty = ({seed: one[i] for seed, one in found.items()} for i in (0, 1))
    return Entry(method, 7, predictor, scores, empty, tuple(seeds))


def curves():
    both = {("pre_train", "loss"): ([1, 2, 3], [3.0, 2.0, 1.0]), ("self_train", "loss"): ([1, 2], [1.0, 0.5])}
    return [charts.Curves(name, name, both | {("self_train", "val_dice"): ([2], [0.7])}) for name in ("a", "<b>")]


@pytest.fixture
def page(tmp_path, shown):
    entries = [entry(predictor="student_a", gain=0.02), entry(predictor="student_b"), entry()]
    content = Page(
        title="sdcl on <t>", head=["WARNING: <b>read</b> this"], entries=entries,
        rows=make_rows(entries, str, "sdcl/mean"), viewer=viewer.viewer(shown, task(), ["student_a", "student_b"]),
        curves=curves(), order=HOSTILE,
    )  # fmt: skip
    assert write_page(tmp_path, content) == ["report.html", "training.png"]
    return tmp_path / "report.html"


# --- what it holds ---


def decoded(address):
    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("planes", [(2, 1, 0), (0,)])
def test_label_maps_come_back_voxel_by_voxel_from_their_mosaics(planes):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 400, (7, 5, 6)).astype(np.uint16)  # more classes than a byte holds
    one = Shown("c", Case("c", rng.random((7, 5, 6), np.float32), label), {"mean": label[::-1]})
    (case,) = viewer.viewer([one], task(planes), [])["cases"]
    depth, height, width = case["shape"]
    for address, expected in ((case["reference"], label), (case["maps"]["mean"], label[::-1])):
        picture = decoded(address)
        classes = picture[..., 0] + 256 * picture[..., 1]
        for z in range(depth):
            row, column = divmod(z, case["columns"])
            tile = classes[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert (tile == (expected[:, :, z].T if planes == (2, 1, 0) else expected[z])).all()


def test_the_scan_comes_back_in_its_own_units():
    case, maps = case_of("c", shape=(40, 32, 24))
    (one,) = viewer.viewer([Shown("c", case, maps)], task(), [])["cases"]
    tile = decoded(one["image"])[: one["shape"][1], : one["shape"][2], 0]
    back = one["low"] + tile / 255 * (one["high"] - one["low"])
    assert np.abs(back - case.image[:, :, 0].T).max() < 0.06 and one["spacing"] == [2.0, 1.0, 1.0]


def test_a_page_that_would_be_too_large_shows_less_and_says_what(shown):
    def size(data):
        return sum(
            len(one["image"]) + len(one["reference"]) + sum(map(len, one["maps"].values())) for one in data["cases"]
        )

    whole = viewer.viewer(shown, task(), [])
    assert "quality 60" in whole["said"] and "left out" not in whole["said"] and len(whole["cases"]) == 3
    rng = np.random.default_rng(0)
    noisy = [
        Shown(f"c{k}", Case(f"c{k}", rng.random((48, 48, 32), np.float32), np.zeros((48, 48, 32), np.uint8)), {})
        for k in range(6)
    ]
    need = size(viewer.viewer(noisy, task(), []))
    for share, said in ((0.6, "quality"), (0.12, "second voxel"), (0.05, "of 6 cases left out")):
        less = viewer.viewer(noisy, task(), [], int(need * share))
        assert size(less) <= need * share and said in less["said"]
    assert len(less["cases"]) >= 3


def test_nothing_but_numbers_and_a_flat_scan():
    flat = Case("c", np.full((4, 4, 4), np.nan, np.float32), np.zeros((4, 4, 4), np.uint8))
    (one,) = viewer.viewer([Shown("c", flat, {})], task(), [])["cases"]
    assert one["high"] > one["low"]
    json.dumps(one, allow_nan=False)


def test_embedded_json_ends_no_script_and_reads_back():
    content = {"name": HOSTILE[0], "more": "\u2028]]>&amp;"}
    text = embedded(content)
    assert "<" not in text and ">" not in text and json.loads(text) == content


def test_names_are_text_wherever_they_stand(page):
    text = page.read_text("utf-8")
    assert "<img" not in text and "<b>" not in text and "onerror=alert(1)&gt;" in text
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert viewer.read_viewer(page)["cases"][0]["name"] == HOSTILE[0]


def test_a_page_that_holds_no_pictures_is_refused_by_name(tmp_path):
    (tmp_path / "report.html").write_text("<html>", encoding="utf-8")
    for name in ("report.html", "missing.html"):
        with pytest.raises(Exception, match=f"{name} cannot be read"):
            viewer.read_viewer(tmp_path / name)


def test_bland_altmans_bias_and_limits_by_hand():
    """ml of 1, 1.1, 1.2 against 1: a bias of 0.1, a standard deviation of 0.1, limits at 0.1 ± 0.196."""
    with inked():
        chart = bland_altman(entry())
    title = chart.figure.axes[0].get_title()
    assert "bias +0.1 ml, limits -0.096 to +0.296" in title
    assert chart.points["volumes-0"][2] == "plain: 1.2 ml predicted, 1 in the reference"


def test_points_carry_their_names_and_the_pages_ink():
    with inked():
        svg = svg_of(bland_altman(entry()), "k")
    assert svg.count('class="point"') == 6 and "currentColor" in svg and charts.INK not in svg
    assert "&lt;/script&gt;" in svg and 'id="k-volumes-0"' in svg


def test_a_curve_is_binned_to_means():
    x, y = binned(range(1, 481), [float(k) for k in range(1, 481)])
    assert len(x) == charts.CURVE_POINTS and x[0] == y[0] == 2.5
    x, y = binned([1, 2, 3], [1.0, float("nan"), 3.0])
    assert x.tolist() == [1, 3] and y.tolist() == [1, 3]


def test_a_runs_records_become_curves(tmp_path):
    header = "iteration,student_a/loss,student_b/loss,discrepancy,val_dice/mean,test_dice/mean\n"
    for stage, lines in (("pre_train", "1,3,1,,,\n2,2,2,,0.5,\n"), ("self_train", "1,1,3,0.1,,0.4\n2,to")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.csv").write_text(header + lines, encoding="utf-8")
    stages = {name: tmp_path / name for name in ("pre_train", "self_train")}
    found = {one.name: one.values for one in charts.run_curves(stages)}
    assert found["student a"]["pre_train", "loss"] == ([1, 2], [3, 2])
    assert found["mean"] == {("pre_train", "val_dice"): ([2], [0.5]), ("self_train", "test_dice"): ([1], [0.4])}
    assert found["both students"] == {("self_train", "discrepancy"): ([1], [0.1])}
    one = charts.answer_curves("sdcl", "sdcl, seed 1", "mean", stages)
    assert one.values["pre_train", "loss"] == ([1, 2], [2, 2]) and one.values["self_train", "discrepancy"][1] == [0.1]
    assert charts.training([]) is None and charts.run_curves({"self_train": tmp_path / "none"}) == []


def test_the_references_worst_median_and_best_come_first():
    entries = [entry("bcp", gain=0.1), entry()]
    compared = Compared(entries, make_rows(entries, str, "sdcl/mean"), [], [], "sdcl/mean")
    assert ranked(compared) == HOSTILE  # of Dice 0.5, 0.6, 0.7
    one = [entry(structures=("one",))]
    assert ranked(Compared(one, make_rows(one, str, "sdcl/mean"), [], [], "sdcl/mean")) == HOSTILE


def test_an_experiments_viewer_joins_the_rows_answers(shown):
    data = viewer.viewer(shown, task(), [])
    joined = viewer.joined({"sdcl": (data, "mean"), "bcp": (data, "student_a")}, [HOSTILE[2], HOSTILE[0], "unknown"])
    assert joined["names"] == ["sdcl", "bcp"] and [one["name"] for one in joined["cases"]] == [HOSTILE[2], HOSTILE[0]]
    first = joined["cases"][0]
    assert first["maps"]["bcp"] == data["cases"][2]["maps"]["student_a"] and first["title"] == "worst: plain"
    assert "1 of 3 cases are left out" in joined["said"]


def test_rows_without_a_seed_and_several_counts_are_shown_as_far_as_they_go():
    empty = Entry("cps", 7, "mean", {}, {}, (1,))
    entries = [entry(), empty]
    sections = sections_of(Page("t", [], entries, make_rows(entries, str, "sdcl/mean")))
    assert [section.id for section in sections] == ["volumes", "points", "table"]
    assert len(sections[0].charts) == 1 and "missing: 1" in str(sections[2].tables[0].lines)
    half = [replace(one, planned=(1, 2)) for one in entries]  # no row is whole yet
    sections = sections_of(Page("t", [], half, make_rows(half, str, "sdcl/mean")))
    assert sections[1].charts and "1 of 2 (missing: 2)" in str(sections[2].tables[0].lines)
    assert ranked(Compared([empty, *half], make_rows(half, str, "cps/mean"), [], [], "cps/mean")) == HOSTILE


def test_volumes_of_earlier_tests_and_of_some_spacings_only():
    """Without volumes there is no chart; where one case lacks its spacing all are in voxels; seeds are points."""
    old = entry()
    assert bland_altman(replace(old, scores={1: {k: v for k, v in old.scores[1].items() if k[0] == "dice"}})) is None
    old.scores[1]["ml", "one"]["plain"] = float("nan")
    assert "voxels" in bland_altman(old).figure.axes[0].get_title()
    both = bland_altman(entry(seeds=(1, 2)))
    assert len(both.points["volumes-0"]) == 6 and both.points["volumes-0"][-1].startswith("plain, seed 2: 1.2 ml")


def test_a_volume_too_large_for_one_picture_is_shown_coarser(monkeypatch):
    monkeypatch.setattr(viewer, "MAX_SIDE", 40)
    one = Shown(
        "c", Case("c", np.random.default_rng(0).random((24, 20, 9), np.float32), np.ones((24, 20, 9), np.uint8)), {}
    )
    data = viewer.viewer([one], task(), [])
    assert data["cases"][0]["shape"] == [5, 10, 12] and "at every second voxel" in data["said"]


def test_too_many_points_are_the_structures_means(monkeypatch):
    entries = [entry()]
    page = Page("t", [], entries, make_rows(entries, str, "sdcl/mean"))
    assert "".join(sections_of(page)[1].charts[0][1].points).count("dice") == 3
    monkeypatch.setattr("sdcl.scoring.page.MOST_POINTS", 20)
    _, points, *_ = sections_of(page)
    assert points.title == "Each case (the mean of its structures)" and list(points.charts[0][1].points) == ["dice-0-0"]


def many(number):
    """A page of so many cases with one row."""
    names = [f"case{k:02d}" for k in range(number)]
    shown = [Shown(name, *case_of(name)) for name in names]
    rows = [
        {"structure": s, "case": name, "empty": False, "dice": 0.5 + 0.01 * k, "jaccard": 0.4, "voxels": 100 + k,
         "hd95": 3.0, "asd": 1.0, "hd95_mm": 3.0, "asd_mm": 1.0, "reference_voxels": 100, "ml": 1.0,
         "reference_ml": 1.0}
        for k, name in enumerate(names) for s in ("one", "two")
    ]  # fmt: skip
    scores, empty = scores_of(rows)
    entries = [Entry("sdcl", 7, "mean", {1: scores}, {1: empty}, (1,))]
    cells = make_rows(entries, str, "sdcl/mean")
    return Page("t", [], entries, cells, viewer.viewer(shown, task(), []), order=names)


def test_a_page_of_many_cases_keeps_to_its_size_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    page = many(30)
    monkeypatch.setattr("sdcl.scoring.page.MOST_POINTS", 60)
    monkeypatch.setattr("sdcl.scoring.page.MOST_CELLS", 120)
    volumes, points, *_ = sections_of(page)
    assert points.title == "Each case (the mean of its structures; 10 of 30 cases are drawn)"
    assert volumes.title == "Volume, predicted against reference"
    names = points.charts[0][1].points["dice-0-0"]
    assert len(names) == 10 and [name.split(",")[0] for name in names][:3] == ["case00", "case01", "case02"]
    (mean,) = {line.get_segments()[0][0][1] for line in points.charts[0][1].figure.axes[0].collections[1:]}
    assert mean == pytest.approx(0.5 + 0.01 * 14.5)  # of all cases, drawn or not
    assert (
        points.tables[0].title.endswith("mean; the first 20 of 30, cases.csv has all")
        and len(points.tables[0].lines) == 21
    )
    monkeypatch.setattr("sdcl.scoring.page.MOST_POINTS", 20)
    assert sections_of(page)[0].title == "Volume, predicted against reference; 10 of 30 cases are drawn"

    write_page(tmp_path, page)
    whole = (tmp_path / "report.html").read_text(encoding="utf-8")
    bound = len(whole) - 8_000
    monkeypatch.setattr("sdcl.scoring.page.MOST_BYTES", bound)
    write_page(tmp_path, page)
    smaller = (tmp_path / "report.html").read_text(encoding="utf-8")
    kept = len(read_viewer(tmp_path / "report.html")["cases"])
    assert len(smaller.encode()) <= bound and 3 <= kept < 30
    assert f"{30 - kept} more cases are left out, so that this page stays small." in smaller
    monkeypatch.setattr("sdcl.scoring.page.MOST_BYTES", 10_000)
    write_page(tmp_path, page)
    assert "above the limit of 0.01 MB." in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(read_viewer(tmp_path / "report.html")["cases"]) == 3


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_give_no_warning(tmp_path):
    name = "患者\u0e01"
    shown = [Shown(name, *case_of(name))]
    numbers = ("dice", "jaccard", "hd95", "asd", "hd95_mm", "asd_mm", *VOLUMES)
    scores, empty = scores_of([{"structure": "心", "case": name, "empty": False} | dict.fromkeys(numbers, 0.5)])
    entries = [Entry(name, 7, "mean", {1: scores}, {1: empty}, (1,))]
    cells = make_rows(entries, str, f"{name}/mean")
    write_page(
        tmp_path, Page(name, [], entries, cells, viewer.viewer(shown, task(), []), curves=curves(), order=[name])
    )
    figure = Figure()
    figure.suptitle(name)
    save_figure(figure, tmp_path / "a.png")
    assert name in (tmp_path / "report.html").read_text(encoding="utf-8")


# --- what it does ---


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as play:
        one = play.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def opened(browser, page):
    """The page, opened from the disk with the network off; at the end nothing may have complained."""
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}, color_scheme="dark")
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.case !== undefined", timeout=20_000)
    yield tab
    assert not said and set(asked) <= {"file", "data"}
    context.close()


def caption(tab, plane):
    return tab.evaluate(f"document.querySelector('[data-plane={plane}]').closest('.plane').firstChild.textContent")


def spoken(tab, plane):
    return tab.get_attribute(f"[data-plane={plane}]", "aria-label")


def pixels(tab, plane, shape):
    """Read the colour in the middle of each voxel (rows, columns, 3) of a plane's picture."""
    rows, columns = shape
    script = """([plane, rows, columns]) => {
      const shown = document.querySelector(`[data-plane=${plane}]`), out = [];
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [shown.width, shown.height];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(shown, 0, 0);
      const all = context.getImageData(0, 0, canvas.width, canvas.height).data;
      const at = (k, of, side) => Math.floor((k + 0.5) * side / of);
      for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
        const from = 4 * (at(y, rows, canvas.height) * canvas.width + at(x, columns, canvas.width));
        out.push([...all.slice(from, from + 4)]);
      }
      return out;
    }"""
    return np.array(tab.evaluate(script, [plane, rows, columns])).reshape(rows, columns, 4)[..., :3]


def test_wheel_and_keys_move_through_the_slices(opened):
    axial = opened.locator("[data-plane=axial]")
    assert caption(opened, "axial") == "axial 4 of 8"  # the first of those with most foreground
    axial.hover()
    opened.mouse.wheel(0, 100)
    opened.wait_for_function(
        "document.querySelector('[data-plane=axial]').getAttribute('aria-label').includes('slice 5')"
    )
    for key, place in (("ArrowUp", 6), ("ArrowLeft", 5), ("End", 8), ("ArrowUp", 8), ("Home", 1), ("PageUp", 8)):
        axial.press(key)
        assert caption(opened, "axial") == f"axial {place} of 8"
    opened.locator("[data-plane=coronal]").press("End")
    assert caption(opened, "coronal") == "coronal 10 of 10" and "0 pixels" in spoken(opened, "coronal")


@pytest.mark.parametrize("plane", PLANES)
def test_fill_shows_each_voxel_where_it_is(opened, shown, plane):
    """The pixels are those of the reference, in the colours of the figures, in all three planes."""
    opened.evaluate("document.querySelector('[data-name=mean]').click()")  # off: the reference alone
    grey = "for (const [id, v] of [['level', 127.5], ['window', 510]]) document.getElementById(id).value = v"
    opened.evaluate(grey)
    opened.keyboard.press("f")
    axis, one = PLANES[plane], shown[0]
    k = int(caption(opened, plane).split()[1]) - 1
    expected = np.take(one.case.label, k, axis).T
    expected = expected if plane == "axial" else expected[::-1]
    found = pixels(opened, plane, expected.shape)
    saturation = found.max(-1) - found.min(-1)
    assert ((saturation > 40) == (expected > 0)).all()
    for label, (most, least) in ((1, (0, 2)), (2, (2, 0))):  # the first class is orange, the second blue
        assert (found[expected == label][:, most] > found[expected == label][:, least] + 60).all()


def test_the_disagreement_is_the_one_voxel_that_student_a_lacks(opened, shown):
    opened.locator("[data-plane=axial]").press("Home")
    for _ in range(2):  # to the third slice, where the voxel is
        opened.locator("[data-plane=axial]").press("ArrowUp")
    before = pixels(opened, "axial", (10, 12))
    opened.keyboard.press("d")
    assert "they disagree in 1 pixels" in spoken(opened, "axial")
    for name in ("reference", "mean"):
        opened.evaluate(f"document.querySelector('[data-name={name}]').click()")
    after = pixels(opened, "axial", (10, 12))
    red = (after[..., 0] - after[..., 2] > 60) & (after[..., 0] - after[..., 1] > 30)
    assert np.argwhere(red).tolist() == [[2, 2]] and (before[2, 2] != after[2, 2]).any()
    opened.keyboard.press("d")
    assert "disagree" not in spoken(opened, "axial")


def test_window_and_level_change_the_scan_and_are_told_in_its_units(opened):
    for name in ("reference", "mean"):
        opened.evaluate(f"document.querySelector('[data-name={name}]').click()")
    set_to = "([id, v]) => { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')); }"
    opened.evaluate(set_to, ["level", 255])
    dark = pixels(opened, "axial", (10, 12)).mean()
    opened.evaluate(set_to, ["level", 0])
    assert pixels(opened, "axial", (10, 12)).mean() > dark + 60
    opened.evaluate(set_to, ["window", 2])
    low, _, high = opened.text_content("#intensities").partition(" to ")
    assert float(high) - float(low) == pytest.approx(2 / 255, abs=0.011)


def test_cases_are_chosen_by_list_and_keys_and_a_click_moves_the_other_planes(opened):
    opened.keyboard.press("]")
    opened.wait_for_function(f"document.body.dataset.case === {json.dumps(HOSTILE[1])}")
    assert "0.6100" in opened.text_content("#scores")
    opened.select_option("#case", "2")
    opened.wait_for_function("document.body.dataset.case === 'plain'")
    box = opened.locator("[data-plane=axial]").bounding_box()
    opened.mouse.click(box["x"] + box["width"] * 11.5 / 12, box["y"] + box["height"] * 0.5 / 10)
    assert caption(opened, "sagittal") == "sagittal 12 of 12" and caption(opened, "coronal") == "coronal 1 of 10"


def test_charts_are_chosen_points_are_named_and_curves_switched(opened):
    visible = "[...document.querySelectorAll('#points figure')].map((f) => f.hidden)"
    assert opened.evaluate(visible)[:2] == [False, True]
    opened.select_option("#points select", "1")
    assert opened.evaluate(visible)[:2] == [True, False]
    opened.locator("#volumes .point").first.hover(force=True)
    assert opened.text_content("#tip").startswith(HOSTILE[0]) and opened.is_visible("#tip")
    opened.locator("#training input").first.uncheck()
    shown = "[...document.querySelectorAll('#training [data-row]')].map((c) => c.style.display)"
    assert set(opened.evaluate(shown)) == {"none", ""}


def test_dark_and_light_both_can_be_read(opened):
    def contrast():
        ink, paper = (
            opened.evaluate(f"getComputedStyle(document.querySelector('{of}')).{what}")
            for of, what in (("#points svg text", "fill"), ("body", "backgroundColor"))
        )
        return [sum(int(part) for part in colour.strip("rgb()").split(",")) for colour in (ink, paper)]

    ink, paper = contrast()
    assert ink > 500 and paper < 200
    opened.emulate_media(color_scheme="light")
    ink, paper = contrast()
    assert ink < 200 and paper > 500


@pytest.mark.parametrize("width", [380, 1600])
def test_a_narrow_and_a_wide_window_hold_the_page(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
