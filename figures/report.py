"""A screenshot of ``ngeval report``: ``python -m figures.report`` in a clone.

The page of the demo's rows, its top at widths of 1280 and of 390 pixels side by side. It needs
chromium and chromedriver.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from ngeval.report import write_report

HERE = Path(__file__).parent
ROWS = [HERE / "data" / f"{name}.parquet" for name in ("digits", "digits-norms")]
WIDTHS, HEIGHT = (1280, 390), 2050


def screenshot(page: Path, width: int) -> Image.Image:
    """The top of a page in a window of that width, in pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    service = Service(shutil.which("chromedriver") or "")
    with webdriver.Chrome(options=options, service=service) as driver:
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.as_uri())
        driver.implicitly_wait(20)
        driver.find_element("css selector", ".picture svg")
        return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def main() -> None:
    """Write the page, take the screenshots and save them as one picture."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(ROWS, Path(folder) / "report.html", title="digits-mlp, AdamW")
        shots = [screenshot(page, width) for width in WIDTHS]
    gap = 20
    both = Image.new("RGB", (sum(WIDTHS) + gap, HEIGHT), "#888888")
    both.paste(shots[0], (0, 0))
    both.paste(shots[1], (WIDTHS[0] + gap, 0))
    both.quantize(64).save(HERE / "report.png", optimize=True)


if __name__ == "__main__":
    main()
