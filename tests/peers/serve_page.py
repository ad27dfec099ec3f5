"""The page of a running `mudit serve` in a real Chromium: by mouse, by keyboard, on a phone's width; screenshots.

    python serve_page.py http://127.0.0.1:8000 OUT_DIR [/usr/bin/chromium]     # needs playwright and a Chromium
"""
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

url, out = sys.argv[1], Path(sys.argv[2])
browser_path = sys.argv[3] if len(sys.argv) > 3 else "/usr/bin/chromium"
out.mkdir(parents=True, exist_ok=True)


def watch(page):
    """Everything that goes wrong on a page, and every address that it loads."""
    wrong, loaded = [], []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: loaded.append(r.url))
    return wrong, loaded


def done(page, text="picture"):
    page.wait_for_function("t => document.getElementById('status').textContent.includes(t)", arg=text, timeout=60_000)


with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1180, "height": 860})
    wrong, loaded = watch(page)
    page.goto(url)
    page.wait_for_function("document.getElementById('label').options.length > 1")

    for row in ("#model-row", "#key-row"):
        assert not page.locator(row).is_visible(), f"{row}: there is one model, and no key is needed"

    # By mouse: one picture, watched while it forms.
    page.select_option("#label", index=1)
    page.fill("#seed", "7")
    page.locator("#steps").fill("60")
    page.click("#go")
    page.wait_for_function("document.getElementById('picture').src.startsWith('data:image/png')")
    done(page, "One picture")
    frames = int(page.get_attribute("#film-at", "max"))
    assert frames >= 20, f"{frames} frames of its way"
    last = page.get_attribute("#picture", "src")
    page.locator("#film-at").fill("0")
    assert page.get_attribute("#picture", "src") != last, "the film does not move"
    page.screenshot(path=out / "serve-film.png")

    # The same seed is the same picture; another one is not.
    page.click("#go")
    done(page, "One picture")
    page.wait_for_timeout(100)
    assert page.get_attribute("#picture", "src") == last
    page.keyboard.press("Escape")

    # By keyboard alone: another seed, a grid of all classes, along the grid.
    seed = page.input_value("#seed")
    page.focus("#go")
    page.keyboard.press("r")
    assert page.input_value("#seed") != seed
    page.focus("#every")
    page.keyboard.press("Space")
    page.focus("#seed")
    page.keyboard.press("Enter")
    done(page, "pictures in")
    buttons = page.locator("#grid button")
    assert buttons.count() > 1
    buttons.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert buttons.nth(1).get_attribute("aria-selected") == "true"
    page.screenshot(path=out / "serve.png")
    sources = page.eval_on_selector_all("#grid img", "all => all.map(i => i.src)")
    assert len(set(sources)) == len(sources), "two classes have one picture"

    # Stopping, and an error in words.
    page.locator("#steps").fill("250")
    page.locator("#guidance").fill("3")
    page.click("#go")
    page.keyboard.press("Escape")
    done(page, "Stopped")
    page.evaluate("document.getElementById('steps').removeAttribute('max')")
    page.evaluate("document.getElementById('steps').type = 'number'")
    page.fill("#steps", "99999")
    before = len(wrong)
    page.click("#go")
    done(page, "`steps`: expected a whole number")
    # The browser itself notes the refused request.
    assert all("400" in text for text in wrong[before:]), wrong
    del wrong[before:]
    page.close()

    # A phone: nothing is wider than the screen, all can be touched.
    phone = browser.new_context(viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True, is_mobile=True)
    page = phone.new_page()
    more_wrong, more_loaded = watch(page)
    page.goto(url)
    page.wait_for_function("document.getElementById('label').options.length > 1")
    page.locator("#count").fill("6")
    page.tap("#go")
    done(page, "6 pictures")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "the page is wider than the phone"
    small = page.eval_on_selector_all(
        "button, select, input:not([type=checkbox])", "all => all.filter(e => e.offsetParent && e.offsetHeight < 32).map(e => e.id)")
    assert not small, f"too small to touch: {small}"
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=out / "serve-phone.png")
    page.screenshot(path=out / "serve-phone-full.png", full_page=True)

    page.goto(f"{url}/docs")
    page.wait_for_function("document.querySelectorAll('section').length > 10")
    page.screenshot(path=out / "serve-docs.png")
    wrong, loaded = wrong + more_wrong, loaded + more_loaded
    outside = [u for u in loaded if not u.startswith((url, "data:"))]
    assert not wrong, wrong
    assert not outside, outside
    browser.close()
print(f"page: {len(loaded)} requests, none to elsewhere; screenshots in {out}")
