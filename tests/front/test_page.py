"""The status page in a real Chromium: what it shows, in both themes, on a small screen, and when the server is away."""

import http.client
import math
import os
import shutil
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kit import FORM, TOKEN, Http, Program, eventually, form, secret, serving

from gocm_lib.help.topics import TOPICS

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver here")


@pytest.fixture(scope="module")
def chromium():
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    # No sandbox of its own: it cannot make one as root, as which CI runs. It opens our own page only.
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--window-size=1000,1000",
        "--host-resolver-rules=MAP *.lan 127.0.0.1",  # names that are not localhost, to which browsers tell less
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def sandboxed(tmp_path):
    """A server with its sandbox, and its port."""
    words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--max-attempts", "1", "--fcm-rate", "0")
    program = Program(*words, "--spool", str(tmp_path / "s.db"))
    program.port = int(program.logged(r"listens on \S+ port (\d+)"))
    yield program
    program.kill_group()


@pytest.fixture
def page(chromium, sandboxed):
    chromium.get(f"http://127.0.0.1:{sandboxed.port}/status")
    chromium.server = sandboxed
    yield chromium
    chromium.get("about:blank")


def text(page, name):
    return page.find_element(By.ID, name).text


def send(page, tokens, **options):
    status, _, answer = Http(page.server.port).ask("POST", "/gcm/send", form(tokens, **options), FORM)
    assert status == 200, answer


def complaints(page):
    """What the page's console has to complain of: errors, and violations of its policy."""
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_the_numbers_change_after_a_send(page):
    eventually(lambda: text(page, "sentence") == "All is well, and nothing is waiting to be sent.")
    assert text(page, "failures") == "0" and page.find_element(By.ID, "no-failures").is_displayed()
    send(page, ["phone-1", "gone-phone-2", "invalid-3"])
    send(page, ["canonical-phone-4", "flaky-1-phone-5"], upstream="gcm")
    eventually(lambda: text(page, "failures") == "3")
    eventually(lambda: text(page, "delivered") == "2 delivered in all")
    assert text(page, "unregistered") == "1" and text(page, "unread") == "1 not read yet"
    assert text(page, "failed") == "1 can be replayed" and text(page, "senders") >= "1"
    reasons = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#reasons tr")]
    assert len(reasons) == 3 and any("delete these tokens" in row for row in reasons)
    links = page.execute_script(
        "return [...document.querySelectorAll('#reasons a')].map(each => [each.textContent, each.href])"
    )
    [listed] = [url for name, url in links if name == "the tokens"]
    failed = Http(page.server.port).json("GET", listed.partition(f":{page.server.port}")[2])["failed"]
    assert [each["token"] for each in failed] == ["flaky-1-phone-5"], "a failure leads to its tokens"
    assert {url.rpartition("/")[2] for name, url in links if name == "more"} == {"reports", "failed"}
    [listed] = page.find_elements(By.CSS_SELECTOR, "#last-unregistered li")
    assert listed.text.startswith("gone-p...") and "gone-phone-2" not in page.page_source, "shortened"
    assert " by new-p..." in text(page, "last-replaced")
    upstreams = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#upstreams tr")]
    assert [row.split()[0] for row in upstreams] == ["fcm", "gcm"] and "404: 1" in upstreams[0]
    assert Http(page.server.port).json("GET", "/gcm/report/notregistered") == {"tokens": ["gone-phone-2"]}
    assert complaints(page) == []


def test_the_sparkline_comes_after_a_while(page):
    send(page, [f"phone-{n}" for n in range(200)])
    said = eventually(lambda: "sent a second;" in (page.find_element(By.ID, "trend").get_attribute("aria-label") or ""))
    assert said and len(page.find_elements(By.CSS_SELECTOR, "#trend polyline:not(.rule)")) == 2
    eventually(lambda: page.find_element(By.CSS_SELECTOR, "#trend .sent").get_attribute("points"))
    assert "at most" in text(page, "legend") and complaints(page) == []
    most, half, none = text(page, "rates").split()
    assert most.endswith("/s") and half.endswith("/s") and none == "0", "the scale of what is sent"
    assert text(page, "latencies").endswith(" ms\n0"), "and of latency"
    assert [each.text for each in page.find_elements(By.CSS_SELECTOR, ".times span")] == [
        *("10 min ago", "5 min ago", "now")
    ]


def test_on_a_phone_nothing_is_cut_off(page):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics(390, 800))
    try:
        send(page, ["gone-phone-2", "mismatch-3"])
        eventually(lambda: len(page.find_elements(By.CSS_SELECTOR, "#reasons tr")) == 2)
        widths = "return [document.documentElement.scrollWidth, innerWidth]"
        assert page.execute_script(widths) == [390, 390]
        shown = "const at = each.getBoundingClientRect(); return [at.left, at.right]"
        cells = "[...document.querySelectorAll('td, caption, .card')].filter(each => each.offsetParent)"
        cells = f"return {cells}.map(each => {{{shown}}})"
        for left, right in page.execute_script(cells):
            assert left >= 0 and right <= 390 and right - left > 100, "no column of single words"
        label = "return getComputedStyle(document.querySelector('#reasons td'), '::before').content"
        assert "Tokens" in page.execute_script(label)
        for topic in TOPICS:
            page.get(f"http://127.0.0.1:{page.server.port}/help/{topic}")
            assert page.execute_script(widths) == [390, 390], topic
            assert page.find_element(By.TAG_NAME, "h1").is_displayed() and complaints(page) == [], topic
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_from_the_page_to_the_help_and_back(page):
    page.find_element(By.LINK_TEXT, "Help").click()
    page.find_element(By.CSS_SELECTOR, "main").find_element(By.LINK_TEXT, "sending").click()
    assert page.find_element(By.TAG_NAME, "h1").text == "Send a message"
    page.find_element(By.CSS_SELECTOR, "main").find_element(By.LINK_TEXT, "promise").click()
    page.find_element(By.LINK_TEXT, "status").click()
    eventually(lambda: text(page, "sentence").startswith("All is well"))
    assert complaints(page) == []


@pytest.mark.skipif(
    "PICTURE_OF_THE_PAGE" not in os.environ, reason="PICTURE_OF_THE_PAGE names no file to draw README's picture in"
)
def test_the_picture_in_the_readme(page):
    """Three minutes of traffic that grows and wanes, so that there is something to be seen."""
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics(960, 1320))
    sandbox = Http(int(page.server.logged(r"http://127.0.0.1:(\d+)/sandbox/received")))
    for turn in range(180):
        busy = 1 + math.sin(turn / 20)
        sandbox.json("POST", "/sandbox/mode", {"latency": 0.12 + 0.1 * busy})
        send(page, [f"phone-{turn}-{n}" for n in range(int(20 + 150 * busy))])
        if turn % 40 == 7:
            send(page, [f"gone-{turn}", f"invalid-{turn}"])
            send(page, [f"canonical-{turn}", f"flaky-1-{turn}"], upstream="gcm")
        time.sleep(1)
    eventually(lambda: " by " in text(page, "last-replaced"))
    page.save_screenshot(os.environ["PICTURE_OF_THE_PAGE"])
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def metrics(width, height):
    return {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_both_themes(page, scheme, dark):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    back, front = (luminance(colour) for colour in page.execute_script(script))
    assert (back < front) == dark and (max(back, front) + 0.05) / (min(back, front) + 0.05) > 7
    for words in page.find_elements(By.CSS_SELECTOR, ".soft, button, th, caption, dt"):
        behind = words if words.tag_name == "button" else page.find_element(By.CSS_SELECTOR, ".card")
        here, card = (
            luminance(each.value_of_css_property(what))
            for each, what in ((words, "color"), (behind, "background-color"))
        )
        assert (max(here, card) + 0.05) / (min(here, card) + 0.05) > 4.5, "WCAG 2.2, 1.4.3"


def luminance(colour):
    """Of rgb(r, g, b) or rgba(r, g, b, 1), as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_on_a_screen_of_360_pixels(page):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics(360, 700))
    try:
        send(page, ["gone-phone-2", "invalid-3"])
        eventually(lambda: text(page, "failures") == "2")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_push_is_sent_from_the_page_with_the_keyboard(page):
    eventually(lambda: page.find_element(By.ID, "try").is_displayed())
    field = page.find_element(By.NAME, "tokens")
    field.clear()
    field.send_keys("gone-from-the-page", Keys.ENTER)
    eventually(lambda: text(page, "sent").startswith("Taken as message 0"))
    eventually(lambda: text(page, "unregistered") == "1")
    page.find_element(By.NAME, "payload").send_keys("}", Keys.ENTER)
    eventually(lambda: "payload is not valid JSON" in text(page, "sent"))
    assert [entry for entry in complaints(page) if "400" not in entry] == []


@pytest.fixture
def proxied(sandboxed):
    """The port of a proxy that puts the server below /push/, and calls it by its own address, as nginx does untold."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept = {name: value for name, value in self.headers.items() if name not in ("Host", "Content-Length")}
            upstream = http.client.HTTPConnection("127.0.0.1", sandboxed.port)
            path = self.path.removeprefix("/push") if self.path.startswith("/push/") else "/not-below-push"
            upstream.request(self.command, path, body, kept)
            answer = upstream.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.read())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    with serving(proxy):
        yield proxy.server_port


def test_an_upstream_is_held_and_a_message_cancelled_from_the_page(page):
    server = Http(page.server.port)

    def press(label):
        eventually(lambda: [each for each in page.find_elements(By.TAG_NAME, "button") if each.text == label])[
            0
        ].click()

    eventually(lambda: "sending" in text(page, "upstreams"))
    press("Hold")
    eventually(lambda: "held" in text(page, "upstreams"))
    assert "is held since" in eventually(lambda: "held" in text(page, "sentence") and text(page, "sentence"))
    held = server.json("GET", "/api/status")["upstreams"][0]
    server.ask("POST", "/gcm/send", form(["a", "b"], upstream=held["name"], tag="spring"), FORM)
    page.find_element(By.NAME, "tag").send_keys("spring", Keys.ENTER)
    eventually(lambda: "1 message" in text(page, "found"))
    press("Cancel")
    eventually(lambda: "2 tokens cancelled, 0 were on their way" in text(page, "found"))
    press("Resume")
    eventually(lambda: "held" not in text(page, "upstreams"))


def test_it_works_behind_a_proxy_below_a_path(chromium, proxied):
    chromium.get(f"http://127.0.0.1:{proxied}/push/status")
    eventually(lambda: text(chromium, "sentence").startswith("All is well"))
    eventually(lambda: chromium.find_element(By.ID, "try").is_displayed())
    chromium.find_element(By.NAME, "tokens").send_keys("-by-proxy", Keys.ENTER)
    eventually(lambda: text(chromium, "sent").startswith("Taken as message 0"))
    eventually(lambda: text(chromium, "delivered") == "1 delivered in all")
    assert complaints(chromium) == []
    chromium.get("about:blank")


def test_it_can_be_read_aloud(page):
    """What assistive technology is told: names for all that can be used, headings, tables with captions."""
    eventually(lambda: text(page, "sentence").startswith("All is well"))
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]
    named = [name for role, name in told if role in ("textbox", "button", "table", "image", "region", "heading")]
    assert len(named) >= 12 and all(named), told
    assert ("heading", "Upstreams") in told and ("textbox", "Payload (JSON)") in told


def test_a_server_that_goes_away_is_told_and_asked_ever_more_seldom(page):
    eventually(lambda: text(page, "sentence").startswith("All is well"))
    page.server.kill_group()
    eventually(lambda: text(page, "sentence") == "The server does not answer; what is below is what it said last.")
    eventually(lambda: text(page, "age").startswith("last heard"))
    asked = "return performance.getEntriesByName(location.origin + '/api/status').length"
    eventually(lambda: page.execute_script("return wait") >= 8000)
    before = page.execute_script(asked)
    assert before < 20 and text(page, "failures") == "0"


def test_a_page_that_nobody_sees_asks_nothing(page):
    eventually(lambda: text(page, "sentence").startswith("All is well"))
    page.execute_script(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    eventually(lambda: not page.execute_script("return asking"))
    page.execute_script("performance.clearResourceTimings(); ask()")
    count = "return performance.getEntriesByType('resource').length"
    send(page, ["gone-meanwhile"])
    eventually(lambda: page.execute_script("return performance.now()") > 0)
    assert page.execute_script(count) == 0 and text(page, "unregistered") == "0"
    page.execute_script("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    eventually(lambda: text(page, "unregistered") == "1")
    assert page.execute_script(count) >= 1


@pytest.fixture
def named(tmp_path):
    """A function that starts a server which is called gocm.lan, with an unregistered token in its list."""
    running = []

    def begin(*more, **headers):
        words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--allowed-hosts", "gocm.lan")
        running.append(program := Program(*words, *more, "--spool", str(tmp_path / "s.db")))
        program.port = int(program.logged(r"listens on \S+ port (\d+)"))
        assert Http(program.port).ask("POST", "/gcm/send", form(["gone-phone-2"]), FORM | headers)[0] == 200
        program.ask = lambda path: Http(program.port).ask("GET", path, headers=headers)[2].decode()
        eventually(lambda: "gone-phone-2" in program.ask("/gcm/report/notregistered?peek=1"))
        return program

    yield begin
    for program in running:
        program.kill_group()


@pytest.fixture
def evil():
    """The port of a site with a page that `show` makes."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(site.page)

        def log_message(self, *_):
            pass

    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    with serving(site):
        yield site


def test_a_browser_asks_for_the_password(chromium, named, tmp_path):
    tokens = secret(tmp_path / "tokens", TOKEN)
    server = named("--auth-token-file", tokens, Authorization=f"Bearer {TOKEN}")
    # With the password in the address: given only to a challenge that the browser understands.
    chromium.get(f"http://gocm:{TOKEN}@gocm.lan:{server.port}/status")
    chromium.get(f"http://gocm.lan:{server.port}/status")
    eventually(lambda: text(chromium, "unregistered") == "1")
    chromium.get("about:blank")


def test_no_other_page_clears_a_list(chromium, named, evil):
    server = named()
    target = f"http://gocm.lan:{server.port}/gcm/report/notregistered"
    evil.page = (
        f"<img src='{target}'><img src='{target}?ack=1'><script src='{target}?limit=1'></script>"
        f"<iframe src='{target}?limit=2'></iframe><a id=link href='{target}'>here</a>"
    ).encode()
    chromium.get(f"http://evil.lan:{evil.server_port}/")
    counted = 'gocm_requests_total{route="/gcm/report/notregistered",code="403"} '
    eventually(lambda: counted in (told := server.ask("/metrics")) and float(told.split(counted)[1].split()[0]) >= 4)
    chromium.find_element(By.ID, "link").click()
    eventually(lambda: "POST to .../ack" in chromium.page_source)
    assert "gone-phone-2" in server.ask("/gcm/report/notregistered?peek=1")
    chromium.get("about:blank")
