"""The page as a server: who may reach it, what it sends along, and what it never asks of anybody else."""

from __future__ import annotations

import hmac
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from animatediff.page.jobs import JobQueue, Journal
from animatediff.page.maker import Maker
from animatediff.page.places import Places
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.device import pick_device, pick_dtype
from animatediff.utils import UserError

STYLE = Path(__file__).with_name("style.css")
FONTS = ("system-ui", "sans-serif")
HEADERS = {  # a browser that obeys them asks this server alone
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class ServerOptions:
    """How the page is served.

    Attributes:
        host: address to listen at; one that others can reach needs a password.
        port: None takes the first free one from 7860 on.
        password: asked of everybody, under any user name; "" of nobody.
        models: folder of weight files.
        output_dir: folder of clips and of the journal.
        max_upload_mb: of one file.
        device, dtype: as of `animate`.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    password: str = ""
    models: str = "models"
    output_dir: str = "samples"
    max_upload_mb: float = 64
    device: str = "auto"
    dtype: str | None = None

    def check(self) -> None:
        """Raises: UserError for what would let strangers in, or makes no sense."""
        if not self.local and not self.password:
            raise UserError(
                f"got --host {self.host}, which others can reach, without --password, expected one: add --password"
            )
        if self.port is not None and not 0 < self.port < 65536:
            raise UserError(f"got --port {self.port}, expected 1 to 65535")
        if self.port is not None and (taken := self._taken()):
            raise UserError(f"got --port {self.port}, expected a free one ({taken}): choose another, or leave it out")
        if self.max_upload_mb <= 0:
            raise UserError(f"got --max-upload-mb {self.max_upload_mb:g}, expected more than 0")

    def _taken(self) -> str | None:
        """Why nothing can listen there."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            socket.create_server((self.host, self.port), family=family).close()
        except OSError as error:
            return os.strerror(error.errno) if (error.errno or 0) > 0 else str(error)
        return None

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def serve(options: ServerOptions, *, wait: bool = True) -> Any:
    """Start the page; returns Gradio's blocks, or does not return while it `wait`s.

    Raises:
        UserError: options as `ServerOptions.check`, folders that cannot be made, or Gradio is missing.
    """
    options.check()
    uploads = tempfile.mkdtemp(prefix="animatediff-page-")
    quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": uploads}
    os.environ.update(quiet)  # before Gradio is imported
    try:
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise UserError('the page needs Gradio, which is not installed: pip install -e ".[web]"') from None
    from animatediff.page.app import Page

    places = Places(options.models, options.output_dir)
    journal = Journal(places.output / "page.jsonl")
    device = pick_device(options.device)
    assembler = Assembler(device, pick_dtype(options.dtype, device))
    queue = JobQueue(Maker(places.output, journal, assembler, places.models / "VAE-approx"), journal)
    page = Page(places, queue).build()
    hosts = ["127.0.0.1", "localhost", "[::1]", options.host] if options.local else ["*"]  # no foreign names for us
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(AddHeaders)]
    try:
        page.queue(default_concurrency_limit=8, api_open=False).launch(
            server_name=options.host,
            server_port=options.port,
            auth=(lambda user, given: hmac.compare_digest(given.encode(), options.password.encode()))
            if options.password
            else None,
            allowed_paths=[str(places.output.absolute())],
            max_file_size=int(options.max_upload_mb * 2**20),
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=gr.themes.Default(
                primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=("ui-monospace", "monospace")
            ),
            css_paths=STYLE,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            share=False,
            mcp_server=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"The page is at {page.local_url}; its clips go to {places.output}. Ctrl-C ends it.", flush=True)
        if wait:
            page.block_thread()
    finally:
        if wait:
            shutil.rmtree(uploads, ignore_errors=True)
    return page


class AddHeaders:
    """ASGI middleware that adds HEADERS to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self.app(scope, receive, send_with_headers)
