"""The page in a real browser: it opens in silence, fetches nothing, and is used by pointer, keyboard and phone.

Needs selenium, Chromium and its driver; skipped where one is missing.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_attribution import Counterfactuals, Scores, Subsets

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver")

ATTACK = (
    "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
    "<svg onload='window.attacked = 1'>{{ 7 * 7 }}<!--<script>\u2028\u202e javascript:window.attacked=1"
)
# One word longer than a phone is wide.
LONG = "w" * 400


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve queries, of which one attacks, and forty examples, half of which do; under a hostile column."""
    names = [ATTACK, "good"]
    features = Features({ATTACK: Value("string"), "label": ClassLabel(names=names)})
    texts = [f"{ATTACK} {row} {LONG}" if row % 2 else f"training text {row}" for row in range(40)]
    train = Dataset.from_dict({ATTACK: texts, "label": [row % 2 for row in range(40)]}, features=features)
    asked = [ATTACK if row == 3 else f"query text {row}" for row in range(12)]
    query = Dataset.from_dict({ATTACK: asked, "label": [row % 2 for row in range(12)]}, features=features)
    values = np.random.default_rng(0).normal(size=(12, 40))
    subsets = Subsets.random(40, 30)
    noise = np.random.default_rng(1).normal(size=(30, 2, 12))
    outputs = (subsets.masks @ values.T)[:, None] + noise
    truth = Counterfactuals(subsets, outputs, {"name": ATTACK, "measurement": ATTACK}, {"seconds": 60.0})
    scores = Scores(values, ATTACK, {ATTACK: ATTACK}, {"seconds": 3.0, ATTACK: ATTACK})
    other = Scores(values + np.random.default_rng(2).normal(size=values.shape), "b", {}, {"seconds": 1.0})
    path = tmp_path_factory.mktemp("report") / "page.html"
    return scores.report(path, train, query, counterfactuals=truth, others={ATTACK + "2": other}, title=ATTACK,
                         columns=[ATTACK], self_influence=values[0])  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--disable-dev-shm-usage", "--window-size=1300,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get("about:blank")
    browser.get(page.as_uri())
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#cost svg"))
    return browser


def wait(browser, condition):
    return WebDriverWait(browser, 60).until(lambda _: condition())


def heading(browser) -> str:
    return browser.find_element(By.ID, "query-heading").text


def test_it_opens_in_silence_and_fetches_nothing(opened):
    assert [entry["message"] for entry in opened.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "about:", "blob:"))] == []
    assert sum(url.startswith("file:") for url in urls) == 1
    assert opened.find_elements(By.CSS_SELECTOR, "#scatter svg")


def test_the_query_is_there_before_what_draws_charts_is_read(browser, page):
    source = "window.later = []; window.requestIdleCallback = (act) => window.later.push(act)"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    browser.get("about:blank")
    browser.get(f"{page.as_uri()}#query=5")
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert heading(browser) == "Query 5"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#helpful > li")) == 10
    assert browser.execute_script("return window.vegaEmbed === undefined")
    browser.find_element(By.ID, "option-7").click()  # chosen before there is a chart
    for chart in ("#ranking-list li", "#scatter svg", "#cost svg"):
        browser.execute_script("window.later.shift()()")
        wait(browser, lambda chart=chart: browser.find_elements(By.CSS_SELECTOR, chart))
    assert "query 7" in browser.find_element(By.ID, "scatter-caption").text
    marks = browser.execute_script(
        "return [...document.querySelectorAll('#scatter path[aria-label]')].map((mark) => mark.ariaLabel)"
    )
    assert len(marks) == 30


def test_what_the_data_hold_does_nothing(opened):
    for row in (3, 4):
        opened.find_element(By.ID, f"option-{row}").click()
    opened.find_element(By.ID, "query-search").send_keys("onerror")
    assert opened.execute_script("return window.attacked") is None
    assert opened.find_elements(By.CSS_SELECTOR, "img[src=x], svg[onload], [onerror]") == []
    assert ATTACK.split("\u2028")[0] in opened.find_element(By.ID, "query-list").get_property("textContent")
    assert [entry["message"] for entry in opened.get_log("browser")] == []
    # Even what gets in is not run: the policy names two scripts.
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.attacked = 1'; document.body.append(s);"
    )
    assert opened.execute_script("return window.attacked") is None


def test_search_and_filter(opened):
    listed = lambda: [option.get_attribute("id") for option in opened.find_elements(By.CSS_SELECTOR, "[role=option]")]  # noqa: E731
    assert len(listed()) == 12
    search = opened.find_element(By.ID, "query-search")
    search.send_keys("QUERY TEXT 1")
    assert listed() == ["option-1", "option-10", "option-11"]
    assert opened.find_element(By.ID, "query-count").text == "3 of 12 queries"
    search.send_keys(Keys.CONTROL + "a", Keys.BACKSPACE)
    opened.execute_script(
        "const s = document.getElementById('query-group'); s.value = 'good'; s.dispatchEvent(new Event('input'))"
    )
    assert listed() == [f"option-{row}" for row in (1, 3, 5, 7, 9, 11)]
    shown = lambda: len(opened.find_elements(By.CSS_SELECTOR, "#helpful > li, #harmful > li"))  # noqa: E731
    everything = shown()
    opened.find_element(By.ID, "example-search").send_keys("training text")
    assert 0 < shown() < everything
    assert " of 10 examples" in opened.find_element(By.ID, "helpful-count").text


def test_a_click_and_keys_choose_a_query(opened):
    assert heading(opened) == "Query 0"
    before = opened.find_element(By.ID, "helpful").text
    opened.find_element(By.ID, "option-5").click()
    assert heading(opened) == "Query 5"
    assert opened.find_element(By.ID, "helpful").text != before
    assert "query 5" in opened.find_element(By.ID, "scatter-caption").text
    assert opened.current_url.endswith("#query=5")
    box = opened.find_element(By.ID, "query-list")
    box.send_keys(Keys.ARROW_DOWN)
    assert heading(opened) == "Query 6"
    assert box.get_attribute("aria-activedescendant") == "option-6"
    assert opened.find_element(By.ID, "option-6").get_attribute("aria-selected") == "true"
    assert "Query 6 is shown" in opened.find_element(By.ID, "query-status").get_property("textContent")
    box.send_keys(Keys.END)
    assert heading(opened) == "Query 11"
    assert not opened.find_element(By.ID, "next").is_enabled()
    opened.find_element(By.ID, "previous").click()
    assert heading(opened) == "Query 10"


def test_the_first_tab_stop_skips_to_the_query(opened):
    opened.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert opened.switch_to.active_element.get_attribute("class") == "skip"
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    wait(opened, lambda: opened.switch_to.active_element.get_attribute("id") == "query-heading")


def test_every_control_has_a_name(opened):
    unnamed = opened.execute_script(
        "return [...document.querySelectorAll('input, select, button, [role=listbox], [role=region], img')]"
        ".filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
        " || e.textContent.trim() || e.hasAttribute('alt'))).map(e => e.outerHTML)"
    )
    assert unnamed == []
    landmarks = {name: len(opened.find_elements(By.TAG_NAME, name)) for name in ("header", "nav", "main", "footer")}
    assert landmarks == {"header": 1, "nav": 1, "main": 1, "footer": 1}


def test_the_points_come_as_a_table(opened):
    opened.find_element(By.CSS_SELECTOR, "#scatter-details summary").click()
    wait(opened, lambda: len(opened.find_elements(By.CSS_SELECTOR, "#scatter-details tbody tr")) == 30)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction(browser, opened, scheme):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for row in (3, 5):
        browser.execute_script(f"document.getElementById('option-{row}').click()")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in paper[4:-1].split(",")) > 384
    assert light == (scheme == "light")
    assert [entry["message"] for entry in browser.get_log("browser")] == []
