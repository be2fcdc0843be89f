from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from stabkit.report import Report
from stabkit.report.page import comparison_page
from tests.report.page.browser import browser
from tests.report.synthetic import FINDING, make_chain, make_report, make_step

HOSTILE = "<img src=x onerror=\"document.title='owned'\">&'</script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(driver: Any, tmp_path: Path) -> Any:
    def show(report: Report) -> Any:
        driver.get(report.save(tmp_path / "report.html").as_uri())
        return driver

    yield show
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert severe == []


def shown(driver: Any) -> list[str]:
    return [
        a.get_attribute("data-step") for a in driver.find_elements(By.CSS_SELECTOR, "article.step") if a.is_displayed()
    ]


def column(driver: Any, index: int) -> list[str]:
    return [row.text for row in driver.find_elements(By.CSS_SELECTOR, f"#steps tbody td:nth-child({index})")]


def test_the_page_opens_from_disk_with_the_verdict_first(page):
    driver = page(make_chain([0.1] * 3))
    assert driver.find_element(By.TAG_NAME, "h1").text.split() == ["Net", "stable"]
    assert len(driver.find_elements(By.CSS_SELECTOR, "#spine svg")) == 1


def test_arrow_keys_walk_along_depth_and_stop_at_its_ends(page):
    driver = page(make_chain([0.1, 0.5, 0.1]))
    spine = driver.find_element(By.ID, "spine")
    assert shown(driver) == ["1"]  # the step that changes the gradient most
    for key, step in (
        (Keys.ARROW_RIGHT, "2"),
        (Keys.ARROW_RIGHT, "2"),
        (Keys.HOME, "0"),
        (Keys.ARROW_LEFT, "0"),
        (Keys.END, "2"),
    ):
        spine.send_keys(key)
        assert shown(driver) == [step]
        assert spine.get_attribute("aria-valuenow") == step
    assert "blocks.2" in spine.get_attribute("aria-valuetext")


def test_a_click_on_the_chart_chooses_the_step_under_it(page):
    driver = page(make_chain([0.1, 0.2, 0.3, 0.4]))
    svg = driver.find_element(By.CSS_SELECTOR, "#spine svg")
    width = svg.size["width"]
    left, right, scale = 64, 64, width / 1120
    for step in (0, 2):
        x = (left + (step + 0.5) * (1120 - left - right) / 4) * scale
        driver.execute_script(
            "const [svg, x] = arguments, b = svg.getBoundingClientRect();"
            "svg.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX: b.left + x, clientY: b.top + 60}))",
            svg,
            x,
        )
        assert shown(driver) == [str(step)]


def test_the_region_holds_one_mark_per_eigenvalue_and_says_which_lie_outside(page):
    z = (-0.5 + 0j, -1.5 + 0.2j, 0.5 + 0j)
    driver = page(make_report(make_step(z=z)))
    marks = driver.find_elements(By.CSS_SELECTOR, "article:not([hidden]) [data-region] circle")[1:]
    assert len(marks) == 3
    assert [m.get_attribute("fill") for m in marks].count("var(--orange)") == 1


@pytest.mark.parametrize(("index", "values"), [(8, [-0.3, 0.1, 0.2]), (2, None)])
def test_columns_sort_both_ways_by_value(page, index: int, values: list[float] | None):
    driver = page(make_chain([0.2, -0.3, 0.1]))
    head = driver.find_element(By.CSS_SELECTOR, f"#steps th:nth-child({index}) button")
    head.click()
    rising = column(driver, index)
    head.click()
    assert column(driver, index) == rising[::-1]
    if values:
        assert [float(text.replace("−", "-")) for text in rising] == values
    assert (
        driver.find_element(By.CSS_SELECTOR, f"#steps th:nth-child({index})").get_attribute("aria-sort") == "descending"
    )


def test_values_that_are_not_finite_stay_last_in_the_table(page):
    driver = page(make_report(make_step(0, growth=float("nan")), make_step(1, growth=1.0), make_step(2, growth=-1.0)))
    head = driver.find_element(By.CSS_SELECTOR, "#steps th:nth-child(8) button")
    for _ in range(2):
        head.click()
        assert column(driver, 8)[-1] == "not finite"


def test_a_finding_leads_to_its_step(page):
    report = make_report(make_step(0), make_step(1), make_step(2), findings=(FINDING,), verdict="exploding")
    driver = page(report)
    driver.find_element(By.ID, "spine").send_keys(Keys.END)
    driver.find_element(By.CSS_SELECTOR, ".findings button.go").click()
    assert shown(driver) == ["0"]


def test_names_from_a_model_are_text_and_nothing_else(page):
    step = make_step(0, name=HOSTILE, module_path=HOSTILE, method=HOSTILE, notes=(HOSTILE,), operations=(HOSTILE,))
    driver = page(make_report(step, model=HOSTILE, summary=HOSTILE, notes=(HOSTILE,), loss=HOSTILE))
    assert HOSTILE in driver.title
    assert not driver.find_elements(By.CSS_SELECTOR, "img")
    assert HOSTILE in driver.find_element(By.CSS_SELECTOR, "article h3").text


def test_attribution_is_drawn_part_by_part(page):
    parts = {"spectral": 0.3, "non_normal": 0.4, "alignment": -0.2}
    driver = page(make_report(make_step(0, attribution=parts)))
    title = driver.find_element(By.CSS_SELECTOR, "[data-parts] title").get_attribute("textContent")
    assert all(word in title for word in ("spectral +0.30", "non_normal +0.40", "alignment −0.20"))


def test_dark_and_light_can_be_switched(page):
    driver = page(make_chain([0.1]))

    def paper() -> str:
        return driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = paper()
    driver.find_element(By.ID, "theme").click()
    assert paper() != before


def test_everything_can_be_reached_with_the_tab_key(page):
    driver = page(make_chain([0.1, 0.2]))
    reached = set()
    for _ in range(40):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        active = driver.switch_to.active_element
        reached.add(active.get_attribute("id") or active.text)
    assert {"theme", "spine", "blocks.0"} <= reached


def test_extreme_reports_are_drawn_without_an_error(page):
    page(make_report())
    page(make_report(make_step(growth=float("nan"), growth_interval=(float("nan"), float("nan")), gradient_norm=0.0)))
    page(make_report(make_step(growth=-float("inf"), gradient_norm=float("inf"), z=(), attribution={})))
    page(make_chain([200.0] * 3))


def narrow(driver: Any, width: int = 380) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def phone(driver: Any) -> Iterator[Any]:
    narrow(driver)
    yield driver
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_phone_shows_the_page_without_scrolling_sideways_and_with_text_that_can_be_read(phone, page):
    name = "the_very_long_name_of_an_encoder.layers.with_a_block_that_never_ends"
    page(make_chain([0.1, -0.2] * 10, name=name, module_path=name, attribution={"spectral": 0.1, "alignment": 0.2}))
    assert phone.execute_script("return document.documentElement.scrollWidth") <= 380
    scale = phone.execute_script(
        "const s = document.querySelector('#spine svg');"
        "return s.getBoundingClientRect().width / s.viewBox.baseVal.width"
    )
    assert scale > 0.95  # so 12 px stay 12 px
    marks = phone.find_elements(By.CSS_SELECTOR, "#spine svg rect.chosen")
    assert len(marks) == 1
    chosen = shown(phone)
    narrow(phone, 700)  # turned to its side: drawn anew, with the same step chosen
    assert len(phone.find_elements(By.CSS_SELECTOR, "#spine svg")) == 1
    assert shown(phone) == chosen


def test_the_place_in_the_graph_has_stages_and_skips_and_leads_to_the_neighbours(page):
    blocks = {"A": ((0.0, 0.0), (1.0, 0.0)), "U": ((1.0,), (1.0,)), "B": ((0.5, 0.5),), "V": ((1.0,),)}
    heun = {"tableau": blocks, "stage_fields": (0, 0), "method": "heun"}
    steps = (make_step(0, kind="transition", skip=None, z=None), make_step(1, growth=3.0, **heun), make_step(2))
    driver = page(make_report(*steps))
    place = driver.find_element(By.CSS_SELECTOR, "article:not([hidden]) [data-place]")
    assert len(place.find_elements(By.CSS_SELECTOR, "circle")) == 2
    title = place.find_element(By.CSS_SELECTOR, "title").get_attribute("textContent")
    assert title == "blocks.0, then blocks.1 with a skip of 1, then blocks.2"
    place.find_elements(By.CSS_SELECTOR, "g text")[-2].click()
    assert shown(driver) == ["2"]


def test_the_region_of_a_method_is_its_own_and_the_numerical_range_is_dashed(page):
    blocks = {"A": ((0.0, 0.0), (1.0, 0.0)), "U": ((1.0,), (1.0,)), "B": ((0.5, 0.5),), "V": ((1.0,),)}
    z = (-0.5 + 0j, 0.5 + 0j)  # one lies inside
    heun = make_step(0, growth=2.0, tableau=blocks, stage_fields=(0, 0), method="heun", z=z, field_z=(z,))
    driver = page(make_report(heun, make_step(1, numerical_range=(1 + 0j, 1j, -1 + 0j, -1j))))
    region = "article:not([hidden]) [data-region]"
    assert driver.find_elements(By.CSS_SELECTOR, f"{region} path")
    fills = [c.get_attribute("fill") for c in driver.find_elements(By.CSS_SELECTOR, f"{region} > svg > circle")]
    assert sorted(fills) == ["var(--blue)", "var(--orange)"]
    assert "|R(z)| ≤ 1, heun" in driver.find_element(By.CSS_SELECTOR, region).text
    driver.find_element(By.ID, "spine").send_keys(Keys.END)
    assert len(driver.find_elements(By.CSS_SELECTOR, f"{region} path[stroke-dasharray]")) == 1


def test_norms_have_bands_and_reach_the_last_state(page):
    ends = {"gradient_norm_interval": (1.5, 2.5), "state_norm_interval": (2.5, 3.5)}
    last = {f"output_{name}": value for name, value in ends.items()}
    report = make_report(
        *(make_step(i, **ends) for i in range(3)), output_gradient_norm=1.8, output_state_norm=3.2, **last
    )
    driver = page(report)
    assert len(driver.find_elements(By.CSS_SELECTOR, "#spine path[fill-opacity]")) == 6  # three steps, two norms
    for path in driver.find_elements(By.CSS_SELECTOR, "#spine path[stroke]"):
        assert path.get_attribute("d").count("L") == 3  # four states
    assert "2.00 (1.50 to 2.50)" in driver.find_element(By.CSS_SELECTOR, "article:not([hidden]) .numbers").text


def test_a_finding_and_the_step_shown_first_are_about_the_same_step(page):
    finding = replace(FINDING, steps=(0, 1, 2), module_path="net.blocks.2")
    driver = page(make_report(*(make_step(i) for i in range(4)), findings=(finding,), verdict="exploding"))
    assert shown(driver) == ["2"]
    driver.find_element(By.ID, "spine").send_keys(Keys.HOME)
    driver.find_element(By.CSS_SELECTOR, ".findings button.go").click()
    assert shown(driver) == ["2"]


def test_intervals_of_a_comparison_sort_by_value(driver, tmp_path):
    growths = {"a": -1.0, "b": -3.0, "c": 2.0}
    reports = {name: make_report(make_step(), total_growth_interval=(g, g + 1)) for name, g in growths.items()}
    path = tmp_path / "comparison.html"
    path.write_text(comparison_page(reports))
    driver.get(path.as_uri())
    driver.find_element(By.CSS_SELECTOR, "#reports th:nth-child(5) button").click()
    assert [row.text for row in driver.find_elements(By.CSS_SELECTOR, "#reports td:nth-child(2)")] == ["b", "a", "c"]


def test_a_comparison_shows_every_report(driver, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "comparison.html"
    path.write_text(comparison_page({f"<b>{i}</b>": make_chain(list(rng.normal(0, 0.3, 5))) for i in range(4)}))
    driver.get(path.as_uri())
    assert len(driver.find_elements(By.CSS_SELECTOR, "#map rect title")) == 20
    assert [row.text for row in driver.find_elements(By.CSS_SELECTOR, "#reports td:nth-child(2)")] == [
        f"<b>{i}</b>" for i in range(4)
    ]
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
