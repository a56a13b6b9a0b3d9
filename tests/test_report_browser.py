"""The report in a browser: what a reader clicks, types, sees, prints and saves.

Headless Chromium through chromedriver, both found on PATH; where they are missing, these tests are
deselected (see ``conftest.py``).
"""

import base64
import re
import shutil
import time

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import ngeval
from ngeval.report import write_report
from tests.report_cases import HOSTILE, PAYLOADS, gammas, hostile, layers, samples

pytestmark = [
    pytest.mark.second_stage,
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    # selenium's own: the socket to a driver that is gone.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

WIDE, PHONE = 1280, 390
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page with everything, one with names that mean something to scripts, a hostile one."""
    folder = tmp_path_factory.mktemp("pages")
    tables = {"g.csv": gammas(), "i.csv": samples(), "l.csv": layers()}
    for name, table in tables.items():
        table.to_csv(folder / name, index=False)
    ratios = {"sgd": 1.0, "%{y}": 0.5, "constructor": 2.0, "__proto__": 3.0}
    gammas(ratios).to_csv(folder / "n.csv", index=False)
    payloads = {"sgd": 1.0} | {text: 0.5 + i / 8 for i, text in enumerate(PAYLOADS)}
    gammas(payloads, task=PAYLOADS[0], batches=2).to_parquet(folder / "p.parquet", index=False)
    hostile().to_parquet(folder / "h.parquet", index=False)
    return {
        "whole": write_report([folder / name for name in tables], folder / "whole.html"),
        "names": write_report([folder / "n.csv"], folder / "names.html"),
        "payloads": write_report(
            [folder / "p.parquet"], folder / "payloads.html", title="".join(PAYLOADS)
        ),
        "hostile": write_report(
            [folder / "h.parquet"], folder / "hostile.html", title=HOSTILE["task"]
        ),
    }


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """One browser for all tests."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    folder = tmp_path_factory.mktemp("downloads")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    started.downloads = folder
    yield started
    started.quit()


@pytest.fixture
def visit(driver, pages):
    """Open a page at a width and in a mode; at the end nothing was complained of or fetched."""

    def opened(name="whole", width=WIDE, scheme="light"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [feature]})
        driver.get(pages[name].as_uri())
        wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, ".picture svg"))
        return driver

    driver.get_log("browser"), driver.get_log("performance")
    yield opened
    assert driver.get_log("browser") == []
    request = [
        address
        for entry in driver.get_log("performance")
        if "Network.requestWillBeSent" in entry["message"]
        for address in re.findall(r'"url":"([^"]+)"', entry["message"])
    ]
    assert {address.partition(":")[0] for address in request} <= {"file", "data", "blob"}


def wait(driver, condition):
    return WebDriverWait(driver, 10, poll_frequency=0.05).until(lambda _: condition())


def column(driver, place):
    """The shown cells of a column of the first table."""
    script = (
        "return [...document.querySelector('.sortable').querySelectorAll('tbody tr:not([hidden])')]"
        ".map((row) => row.cells[arguments[0]].textContent)"
    )
    return driver.execute_script(script, place)


def heads(driver):
    return driver.find_elements(By.CSS_SELECTOR, ".sortable:first-of-type th button")


def figure(driver, title):
    result = driver.find_elements(By.CSS_SELECTOR, "figure.chart")
    return next(f for f in result if f.find_element(By.TAG_NAME, "h4").text == title)


def shown_values(driver, chart):
    """The text beside every value of the picture that is shown, by its first line."""
    script = """
        const titles = arguments[0].querySelectorAll('.picture:not([hidden]) circle title');
        return [...titles].map((title) => title.textContent);
    """
    return driver.execute_script(script, chart)


def hovered(driver, chart, start):
    """The text beside the value under the mouse, where the value is drawn whose text starts so."""
    script = """
        const circles = [...arguments[0].querySelectorAll('.picture:not([hidden]) circle')];
        const circle = circles.find((c) => c.textContent.startsWith(arguments[1]));
        circle.scrollIntoView({block: 'center', behavior: 'instant'});
        const box = circle.getBoundingClientRect();
        const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
        const over = document.elementFromPoint(x, y);
        return over.tagName === 'circle' ? over.querySelector('title').textContent : over.tagName;
    """
    return driver.execute_script(script, chart, start)


def choose(driver, chart, label):
    """Choose an entry of a chart's list; its picture is unpacked first."""
    Select(chart.find_element(By.TAG_NAME, "select")).select_by_visible_text(label)
    wait(
        driver,
        lambda: label in chart.find_element(By.CSS_SELECTOR, ".chosen").get_property("textContent"),
    )
    assert len(chart.find_elements(By.CSS_SELECTOR, ".picture:not([hidden]) svg")) == 1


def expected(damping, method, epoch=10):
    summary = ngeval.summarize(gammas(), ("epoch", "method", "damping"))
    row = summary.query("epoch == @epoch and damping == @damping and method == @method").iloc[0]
    ends = ("", "_low", "_high")
    return [f"{row[f'gamma_over_sgd_geomean{end}']:.3g}" for end in ends]


class TestTable:
    def test_a_click_sorts_and_another_turns_round(self, visit):
        driver = visit()
        assert column(driver, 0) == ["sgd", "ief", "ef", "diag"]
        ratio = heads(driver)[1]
        ratio.click()
        values = [float(text) for text in column(driver, 1)]
        assert values == sorted(values)
        assert column(driver, 0)[0] == "ief"
        head = ratio.find_element(By.XPATH, "..")
        assert head.get_attribute("aria-sort") == "ascending"
        ratio.click()
        assert column(driver, 0)[0] == "ef"
        assert head.get_attribute("aria-sort") == "descending"
        heads(driver)[0].click()
        assert column(driver, 0) == ["diag", "ef", "ief", "sgd"]
        assert head.get_attribute("aria-sort") == "none"

    def test_filters(self, visit):
        driver = visit()
        checkpoint, damping = (
            Select(s) for s in driver.find_elements(By.CSS_SELECTOR, "select[data-filter]")
        )
        damping.select_by_visible_text("0.001")
        assert set(column(driver, 5)) == {"0.001"}
        assert column(driver, 1)[1:3] == [expected(1e-3, m)[0] for m in ("ief", "ef")]
        checkpoint.select_by_visible_text("all")
        assert len(column(driver, 0)) == 12
        assert driver.find_element(By.CSS_SELECTOR, ".count").text == "12 rows"
        damping.select_by_visible_text("the best of each method")
        assert dict(zip(column(driver, 0), column(driver, 5), strict=True))["ef"] == "1"


class TestCharts:
    def test_values_under_the_mouse_follow_the_damping(self, visit):
        driver = visit()
        chart = figure(driver, "γ over training")
        for label, damping in (("1e-6", 1e-6), ("0.001", 1e-3)):
            choose(driver, chart, label)
            value, low, high = expected(damping, "ief")
            text = f"ief\nepoch 10, λ = {label}\nγ/γ_SGD = {value} [{low}, {high}]\nbatches: 6"
            assert hovered(driver, chart, f"ief\nepoch 10, λ = {label}") == text

    def test_every_chart_is_drawn_with_its_numbers(self, visit):
        driver = visit()
        charts = driver.find_elements(By.CSS_SELECTOR, "figure.chart")
        assert len(charts) == 5
        for chart in charts:
            pictures = chart.find_elements(By.CSS_SELECTOR, ".picture")
            assert [picture.is_displayed() for picture in pictures].count(True) == 1
            driver.execute_script("arguments[0].querySelector('details').open = true", chart)
            rows = chart.find_elements(By.CSS_SELECTOR, "details tbody tr")
            cells = [[c.text for c in row.find_elements(By.TAG_NAME, "td")] for row in rows]
            assert cells
            assert cells == [text.split("\n") for text in shown_values(driver, chart)]
        chart = figure(driver, "γ over damping")
        rows = [row.text for row in chart.find_elements(By.CSS_SELECTOR, "details tbody tr")]
        assert any(row.startswith("ief epoch 10, λ = 0.001 γ/γ_SGD = 0.7") for row in rows), rows
        assert any("ng epoch 10, λ = 0.001 γ/γ_SGD = 0.25" in row for row in rows)

    def test_every_entry_of_a_list_has_a_picture(self, visit):
        driver = visit()
        chart = figure(driver, "γ over damping")
        entries = [
            option.text for option in Select(chart.find_element(By.TAG_NAME, "select")).options
        ]
        assert entries == ["epoch 0", "epoch 5", "epoch 10"]
        for label in entries:
            choose(driver, chart, label)
            assert any(f"{label}, λ = 0.001" in text for text in shown_values(driver, chart))

    def test_quick_choices_end_with_the_last_one(self, visit):
        driver = visit()
        chart = figure(driver, "γ over damping")
        script = """
            const select = arguments[0].querySelector('select');
            for (const value of ['0', '1', '2', '0', '1']) {
                select.value = value;
                select.dispatchEvent(new Event('change'));
            }
        """
        driver.execute_script(script, chart)
        wait(driver, lambda: any("epoch 5, λ" in text for text in shown_values(driver, chart)))
        time.sleep(0.2)
        assert len(chart.find_elements(By.CSS_SELECTOR, ".picture:not([hidden])")) == 1
        assert any("epoch 5, λ" in text for text in shown_values(driver, chart))

    def test_without_scripts_the_first_picture_is_shown(self, visit):
        driver = visit()
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        try:
            driver.refresh()
            charts = driver.find_elements(By.CSS_SELECTOR, "figure.chart")
            assert len(charts) == 5
            for chart in charts:
                assert len(chart.find_elements(By.CSS_SELECTOR, ".picture svg")) == 1
        finally:
            driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})

    def test_labels_do_not_overlap(self, visit):
        driver = visit(width=PHONE)
        script = """
            const picture = arguments[0].querySelector('.picture:not([hidden]) svg');
            const boxes = [...picture.querySelectorAll('text')]
                .map((e) => [e.textContent, e.getBoundingClientRect(), e.style.fontSize]);
            const found = [];
            boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
                const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (wide > 2 && high > 4) found.push([a, b]);
            }));
            const frame = picture.getBoundingClientRect();
            for (const [a, p, size] of boxes) {
                if (p.left < frame.left - 1 || p.right > frame.right + 1) found.push([a, 'cut']);
                const scale = frame.width / picture.viewBox.baseVal.width;
                if (parseFloat(size) * scale < 9) found.push([a, 'too small']);
            }
            return found;
        """
        for chart in driver.find_elements(By.CSS_SELECTOR, "figure.chart"):
            assert driver.execute_script(script, chart) == [], chart.text


class TestReaders:
    @pytest.mark.parametrize("width", [WIDE, PHONE])
    def test_no_page_scrolls_sideways(self, visit, width):
        for name in ("hostile", "whole"):
            driver = visit(name, width)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            pictures = driver.find_elements(By.CSS_SELECTOR, ".picture:not([hidden]) svg")
            assert pictures
            assert all(0 < picture.size["width"] <= width for picture in pictures)
        boxes = driver.find_elements(By.CSS_SELECTOR, ".sortable .scroll")
        inside = "return arguments[0].scrollWidth > arguments[0].clientWidth"
        assert driver.execute_script(inside, boxes[0]) == (width == PHONE)

    def test_keyboard_alone(self, visit):
        driver = visit()

        def press(*keys):
            ActionChains(driver, duration=0).send_keys(*keys).perform()
            return driver.switch_to.active_element

        assert press(Keys.TAB).text == "Skip to the findings"
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert driver.execute_script(outline) == "solid"
        press(Keys.ENTER)
        assert driver.current_url.endswith("#main")
        heads(driver)[0].send_keys("")  # where a reader would have come to by tabs
        driver.execute_script("document.querySelector('select[data-filter]').focus()")
        reached = [press(Keys.TAB) for _ in range(3)]
        assert reached[0].get_attribute("data-filter") == "damping"
        assert reached[1].get_attribute("role") == "region"
        assert reached[2].text.startswith("method")
        press(Keys.TAB)
        press(Keys.ENTER)
        assert column(driver, 0)[0] == "ief"
        chart = figure(driver, "γ over training")
        select = chart.find_element(By.TAG_NAME, "select")
        driver.execute_script("arguments[0].focus()", select)
        press(Keys.ARROW_DOWN)
        assert Select(select).first_selected_option.text == "0.001"
        wait(driver, lambda: "λ = 0.001" in shown_values(driver, chart)[-1])
        press(Keys.TAB)
        focused = driver.switch_to.active_element
        assert focused.tag_name == "summary"  # of the chart's numbers

    def test_dark(self, visit):
        driver = visit(scheme="dark")
        page = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert page == "rgb(21, 24, 28)"
        chart = figure(driver, "γ over training")
        script = """
            const svg = arguments[0].querySelector('.picture:not([hidden]) svg');
            const ink = [...svg.querySelectorAll('path')]
                .find((path) => path.style.stroke === 'currentcolor');
            const text = [...svg.querySelectorAll('text')].find((e) => e.textContent === 'ief');
            return [getComputedStyle(ink).stroke, getComputedStyle(text).fill];
        """
        assert driver.execute_script(script, chart) == ["rgb(230, 232, 235)"] * 2
        feature = {"name": "prefers-color-scheme", "value": "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [feature]})
        wait(driver, lambda: driver.execute_script(script, chart) == ["rgb(27, 31, 36)"] * 2)

    def test_print(self, visit):
        driver = visit(scheme="dark")
        driver.execute_script(
            "addEventListener('beforeprint', () => { window.printed = ["
            " document.querySelectorAll('.picture:not([hidden]) svg').length,"
            " document.querySelector('#measured details').open]; })"
        )
        sheet = driver.execute_cdp_cmd(
            "Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69}
        )
        content = base64.b64decode(sheet["data"])
        assert content.startswith(b"%PDF")
        assert len(content) > 50_000
        assert driver.execute_script("return window.printed") == [5, True]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        tables = driver.find_elements(By.CSS_SELECTOR, ".sortable table")
        metrics = {"width": 680, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert len(tables) == 1
        assert all(table.size["width"] <= 680 for table in tables)  # of a sheet of A4
        hidden = driver.find_elements(By.CSS_SELECTOR, ".controls, nav, .save")
        assert not any(entry.is_displayed() for entry in hidden)
        assert "damping λ: 1e-6" in driver.find_element(By.CSS_SELECTOR, "figure .chosen").text
        for picture in driver.find_elements(By.CSS_SELECTOR, ".picture:not([hidden]) svg"):
            assert 0 < picture.size["width"] <= 680
            ink = "return getComputedStyle(arguments[0].querySelector('text')).fill"
            assert driver.execute_script(ink, picture) == "rgb(0, 0, 0)"

    def test_save(self, visit):
        driver = visit()
        driver.find_element(By.CSS_SELECTOR, ".save[data-name='g.csv']").click()
        path = driver.downloads / "g.csv"
        wait(driver, path.exists)
        saved = pd.read_csv(path, keep_default_na=True)
        original = gammas().assign(reason=float("nan"))
        assert_frame_equal(saved, original, check_dtype=False)

    def test_names_that_mean_something_to_scripts(self, visit):
        driver = visit("names")
        chart = figure(driver, "γ over training")
        names = ["%{y}", "constructor", "__proto__"]
        texts = chart.find_elements(By.CSS_SELECTOR, ".picture:not([hidden]) text")
        assert set(names) <= {text.get_attribute("textContent").strip() for text in texts}
        for name in names:
            assert hovered(driver, chart, f"{name}\nepoch 10").startswith(f"{name}\nepoch 10")

    def test_hostile_names(self, visit):
        driver = visit("hostile")
        chart = figure(driver, "γ over training")
        name = "…" + HOSTILE["method"][-31:]
        texts = chart.find_elements(By.CSS_SELECTOR, ".picture:not([hidden]) text")
        assert name in [text.get_attribute("textContent") for text in texts]
        assert hovered(driver, chart, f"{name}\n").startswith(f"{name}\n")
        driver.execute_script("arguments[0].querySelector('details').open = true", chart)
        assert name in chart.find_element(By.CSS_SELECTOR, "details tbody").text
        choose(driver, chart, "0.001")
        assert hovered(driver, chart, f"{name}\n").startswith(f"{name}\n")
        shown = driver.find_element(By.TAG_NAME, "body").text
        assert HOSTILE["reason"] in shown
        assert HOSTILE["method"] in shown
        assert driver.title == HOSTILE["task"]
        assert not chart.find_elements(By.CSS_SELECTOR, "a[href^='javascript']")
        time.sleep(0.1)  # what would have been started by a name
        assert driver.execute_script("return window.hit") is None

    def test_no_name_raises_an_alert(self, visit):
        driver = visit("payloads")  # an open alert would make every later command fail
        chart = figure(driver, "γ over training")
        assert any(text.startswith("<script>") for text in shown_values(driver, chart))
        for select in driver.find_elements(By.CSS_SELECTOR, "figure select"):
            for place in range(len(Select(select).options)):
                Select(select).select_by_index(place)
        for detail in driver.find_elements(By.TAG_NAME, "details"):
            driver.execute_script("arguments[0].open = true", detail)
        time.sleep(0.2)  # what would have been started by a name
        assert driver.title == "".join(PAYLOADS)
        shown = driver.find_element(By.TAG_NAME, "body").text
        assert all(payload.split("\u2028")[0] in shown for payload in PAYLOADS)
        foreign = "iframe, object, embed, img, a[href^='javascript'], [onerror], [onload]"
        assert driver.find_elements(By.CSS_SELECTOR, foreign) == []
