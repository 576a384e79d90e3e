"""Proves: no text of a prompt, an answer, a judge or a run becomes markup in the report; and no server that is asked
leads to another, is given a key that is not its own, or has a secret written down.

The report is opened in a real browser where there is one, as well as read by an HTML parser: a script that ran would
have changed the page's title. What a browser does beyond its first rendering is not shown.
"""

import io
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_sppo import command_line
from megatron_sppo.errors import ConfigError, DataError
from megatron_sppo.json_files import read_json, write_json
from megatron_sppo.judge.endpoint import EndpointJudge
from megatron_sppo.report import page as page_module
from megatron_sppo.report.page import write_report
from megatron_sppo.rollout.config import ServerConfig
from megatron_sppo.rollout.openai_server import HttpError, OpenAIServer
from megatron_sppo.rollout.server import ServerSampler
from tests.reliability.tally import Tally
from tests.unit.report.test_page import Page
from tests.unit.selfplay.synthetic import write_run

DEED = "document.title='owned'"
"""What every script tries."""
CARRIERS = (
    "<script>{0}</script>",
    "</script><script>{0}</script>",
    "<ScRiPt>{0}</sCrIpT>",
    "<script/x>{0}</script>",
    "<img src=x onerror={0}>",
    '<img src="x" onerror="{0}">',
    "<svg onload={0}>",
    "<svg><script>{0}</script></svg>",
    "<math><mtext><script>{0}</script></mtext></math>",
    "<body onload={0}>",
    "<details open ontoggle={0}>",
    "<iframe srcdoc='<script>parent.{0}</script>'></iframe>",
    "<iframe src=javascript:parent.{0}></iframe>",
    "<object data='data:text/html,<script>{0}</script>'></object>",
    "<embed src=javascript:{0}>",
    "<a href=javascript:{0} autofocus onfocus={0}>x</a>",
    "<input autofocus onfocus={0}>",
    "<marquee onstart={0}>",
    "<video><source onerror={0}></video>",
    "<style>@import 'javascript:{0}';</style>",
    "<link rel=stylesheet href=javascript:{0}>",
    "<meta http-equiv=refresh content='0;url=javascript:{0}'>",
    "<base href='javascript:{0}//'>",
    "<form action=javascript:{0}><input type=submit></form>",
    "<template><script>{0}</script></template>",
    "<noscript><p title='</noscript><img src=x onerror={0}>'>",
    "<!--><script>{0}</script-->",
    "<![CDATA[<script>{0}</script>]]>",
    "<?xml version='1.0'?><script>{0}</script>",
    '"><script>{0}</script>',
    "'><script>{0}</script>",
    '" onmouseover={0} x="',
    "' onclick={0} x='",
    "`onerror={0}`",
    "</td></tr></table><script>{0}</script>",
    "</style><script>{0}</script>",
    "</title><script>{0}</script>",
    "</pre></details><script>{0}</script>",
    "&lt;script&gt;{0}&lt;/script&gt;",
    "&#60;script&#62;{0}&#60;/script&#62;",
    "\\x3cscript\\x3e{0}\\x3c/script\\x3e",
    "\\u003cscript\\u003e{0}\\u003c/script\\u003e",
    "+ADw-script+AD4-{0}+ADw-/script+AD4-",
    "\ufeff<script>{0}</script>",
    "<scr\x00ipt>{0}</scr\x00ipt>",
    "<scr\u200bipt>{0}</script>",
    "<script\x0c>{0}</script\x0c>",
    "<\u017fcript>{0}</\u017fcript>",
    "<wbr><script>{0}</script>",
    "</span> <span>[<script>{0}</script>",
)
PLACES = ("texts", "names")
"""Prompts, answers and tokens; names of judges, of the model and of the run's commands."""


def payloads() -> list[tuple[str, str]]:
    return [(place, carrier.format(DEED)) for carrier in CARRIERS for place in PLACES]


def report_with(run_dir: Path, place: str, payload: str) -> Path:
    if place == "texts":
        return write_report(write_run(run_dir, num_iterations=1, hostile=payload))
    write_run(run_dir, num_iterations=1)
    summary, state = read_json(run_dir / "summary.json"), read_json(run_dir / "state.json")
    for entry in summary["iterations"]:
        entry["judge"] += payload
    state["config"] = {"run": {"model": f"m/{payload}"}, "scoring": {"judge": payload}, payload: [payload]}
    state["versions"] = {payload: payload}
    state["stages"] = {payload: {"command": [payload], "status": "done", "inputs_sha256": "", "outputs": {}}}
    write_json(run_dir / "summary.json", summary)
    write_json(run_dir / "state.json", state)
    return write_report(run_dir)


ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h4", "p", "div", "span", "b", "section"),
    *("img", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre", "wbr", "i", "em", "code", "br"),
}


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take seconds and hold no markup; those with hostile names are drawn in tests/unit/report."""
    for module in (page_module.plots, page_module):
        for name in [name for name in vars(module) if re.fullmatch("[a-z][a-z_]*_figure", name)]:
            monkeypatch.setattr(module, name, lambda *_: "data:image/png;base64,AAAA")


def test_no_text_becomes_markup(tally: Tally, tmp_path: Path, without_figures: None) -> None:
    """All tags are the page's own, none has a handler, the policy is the strict one; then a browser renders it."""
    chosen, pages = payloads(), []
    for number in tally.cases("injections", 20, len(chosen)):
        place, payload = chosen[number * 7 % len(chosen)]
        with tally.case("injections", f"report, {place}: {payload!r}"):
            path = report_with(tmp_path / f"run-{number}", place, payload)
            page = Page(path.read_text(encoding="utf-8"))
            assert {tag for tag, _ in page.tags} <= ALLOWED, payload
            attributes = {name for _, held in page.tags for name in held}
            assert not any(name.startswith("on") or name in ("href", "srcdoc") for name in attributes)
            assert all(held.get("src", "data:").startswith("data:image/") for tag, held in page.tags if tag == "img")
            (policy,) = (held["content"] for tag, held in page.tags if held.get("http-equiv"))
            assert policy.startswith("default-src 'none'") and "script-src" not in policy
            pages.append(path)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:  # the parser's view is what could be had
        return
    for path in pages[:: max(1, len(pages) // 4)][:4]:
        assert "owned" not in rendered_title(browser, path, tmp_path)


def rendered_title(browser: str, path: Path, scratch: Path) -> str:
    """Render a page in a browser -> its title, when it has settled."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command = [browser, *flags, f"--user-data-dir={scratch / 'browser'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-500:]
    return title[1]


def test_the_browser_sees_a_script_where_nothing_is_escaped_and_the_policy_alone_stops_it(
    tmp_path: Path, without_figures: None
) -> None:
    """What the test above would notice, and that the policy holds where an escape were forgotten."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        return
    bare = tmp_path / "bare.html"
    bare.write_text(f"<html><head><title>x</title></head><body><script>{DEED}</script></body></html>")
    assert rendered_title(browser, bare, tmp_path) == "owned"
    path = write_report(write_run(tmp_path / "run", num_iterations=1))
    forgotten = f"<main><script>{DEED}</script><img src=x onerror={DEED}>"
    path.write_text(path.read_text(encoding="utf-8").replace("<main>", forgotten), encoding="utf-8")
    assert rendered_title(browser, path, tmp_path) == "Self-play: run"


class Elsewhere(ThreadingHTTPServer):
    """Answers everything by a redirection, or by nothing, and remembers what it was sent."""

    daemon_threads = True

    def __init__(self, location: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.location, self.status = location, 302
        self.seen: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Elsewhere

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))
        self.send_response(self.server.status if self.server.location else 200)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[Elsewhere, Elsewhere]]:
    """One that redirects, and the one that it leads to."""
    with Elsewhere(None) as target, Elsewhere("") as source:
        source.location = target.url
        for server in (source, target):
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield source, target
        source.shutdown()
        target.shutdown()


LOCATIONS = ("http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "ftp://127.0.0.1/x", "//127.0.0.1:9/",
             "http://user:pass-word@127.0.0.1:9/v1", "gopher://127.0.0.1:9/_x", "http://[::1]:9/")  # fmt: skip


@pytest.mark.counts("injections")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_followed_by_nobody(
    status: int, servers: tuple[Elsewhere, Elsewhere], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = servers
    source.status = status
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-ours")
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret-of-ours")
    monkeypatch.setenv("SPPO_ENDPOINT_CACHE", "")
    for body in (None, {"prompt": [1]}):
        with pytest.raises(HttpError, match=f"HTTP {status} it redirects to {target.url}, where nothing is sent"):
            OpenAIServer(source.url, key="sk-secret-of-ours", timeout_seconds=5).exchange("/x", body)
    with pytest.raises(DataError, match="redirects to .*If you trust that address"):
        EndpointJudge(source.url)
    with pytest.raises(ConfigError, match="no server answers .*redirects to"):
        ServerSampler(ServerConfig(server=(source.url,), server_weights="trust"), max_model_len=8)
    assert source.seen and target.seen == []


@pytest.mark.counts("injections")
@pytest.mark.parametrize("location", LOCATIONS)
def test_a_redirection_to_what_is_no_server_of_ours_is_said_without_its_password(
    location: str, servers: tuple[Elsewhere, Elsewhere]
) -> None:
    source, _ = servers
    source.location = location
    with pytest.raises(HttpError, match="where nothing is sent") as caught:
        OpenAIServer(source.url, key="k", timeout_seconds=5).exchange("/x")
    assert "pass-word" not in str(caught.value)


SECRETS = {
    "HF_TOKEN": "hf_0123456789abcdefghijABCDEFGHIJ",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdefghij",
    "AWS_SECRET": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY",
    "DB_PASSWORD": "correct horse battery",
}


@pytest.mark.counts("injections")
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_in_no_log_and_no_error_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRETS[name])
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    root = logging.getLogger()
    handlers = root.handlers[:]
    for handler in handlers:
        root.removeHandler(handler)
    address = f"https://user:{SECRETS[name].replace('/', '')}@host/x"

    def main() -> None:
        logging.getLogger("megatron_sppo").warning("asked %s with %s", address, {"Authorization": SECRETS[name]})
        raise DataError(f"{address} does not take {SECRETS[name]}. Choose another.")

    monkeypatch.setattr(sys, "argv", ["x"])
    try:
        with pytest.raises(SystemExit):
            command_line.run(main, name="x")
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
    assert err.getvalue().count("***") >= 3
    assert SECRETS[name] not in err.getvalue() and f"user:{SECRETS[name][:4]}" not in err.getvalue()


@pytest.mark.counts("injections")
def test_a_secret_is_in_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_figures: None) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    run_dir = write_run(tmp_path / "run", num_iterations=1)
    state = read_json(run_dir / "state.json")
    state["config"] = {"servers": {"server": "http://user:pass-word@host:1"}, "run": {"note": SECRETS["HF_TOKEN"]}}
    command = ["curl", "-H", f"Authorization: Bearer {SECRETS['HF_TOKEN']}"]
    state["stages"] = {"a": {"command": command, "status": "done"}}
    write_json(run_dir / "state.json", state)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert SECRETS["HF_TOKEN"] not in page and "pass-word" not in page and "***" in page
    assert json.loads((run_dir / "state.json").read_text())["config"] == state["config"]
