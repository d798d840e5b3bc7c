"""The page: its layout and what happens when something on it is touched."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from animatediff.config.prompt_warnings import prompt_warnings
from animatediff.config.prompt_yaml import BUNDLED, load_config
from animatediff.config.request import Request
from animatediff.config.settings import dump_yaml
from animatediff.config.spellings import as_values
from animatediff.features.noise import draw_seed
from animatediff.media.video import read_metadata
from animatediff.page import views
from animatediff.page.fields import PROMPT, form_fields
from animatediff.page.form import Mistakes, fill_form, placed, read_form
from animatediff.page.jobs import JobQueue
from animatediff.page.places import EXAMPLES, Places
from animatediff.page.presets import EXAMPLE_CLIPS, one_prompt, read_settings
from animatediff.page.widgets import QUIET, Form, text_of
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.prompts import first_text
from animatediff.pipeline.rehearse import rehearse
from animatediff.pipeline.run import check_control_images
from animatediff.pipeline.tagged_loras import with_tagged_loras
from animatediff.utils import UserError

GALLERY = 48  # clips of the gallery, the newest
EVERY = 0.7  # seconds between two looks at the queue
TAB_JS = (
    "(session) => [session, sessionStorage.tab ??= Array.from(crypto.getRandomValues(new Uint8Array(16)), "
    'b => b.toString(16).padStart(2, "0")).join("")]'
)  # sessionStorage: two tabs are two, a tab that is loaded again stays the same
SHOW_MISTAKE = """() => {
  const wrong = document.querySelector(".wrong, .note .sentence");
  wrong?.scrollIntoView({block: "center", behavior: "smooth"});
  wrong?.querySelector("input, textarea")?.focus({preventScroll: true});
}"""
DROP_HELP = "Of ours, AUTOMATIC1111 or ComfyUI: the form is filled with what made it."
OF_THE_MODEL = ("size.width", "size.height", "sampling.guidance_scale")  # whose defaults depend on the image model
Session = dict[str, Any]  # of one tab: tab, wrong, chosen
Seen = dict[str, Any]  # what was sent to it last: jobs, finished, clips


class Page:
    """The page over a queue of jobs; `build` gives it to Gradio."""

    def __init__(self, places: Places, queue: JobQueue):
        self.places, self.queue = places, queue
        self.form = Form(places, fill_form(one_prompt(load_config(BUNDLED).entries[0], 8)))

    # ---- layout -----------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        with gr.Blocks(
            title="AnimateDiff", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
        ) as page:
            self.session, self.seen = gr.State({}), gr.State({})
            self.tab = gr.Textbox(visible=False)
            gr.HTML("<h1>AnimateDiff</h1>", elem_id="title", padding=False)
            with gr.Row(elem_id="page"):
                with gr.Column(elem_id="left"):
                    with gr.Column(elem_id="ask"):
                        self._ask()
                    with gr.Column(elem_id="options"):
                        self.form.folded()
                        self._tools()
                with gr.Column(elem_id="right"):
                    with gr.Column(elem_id="result"):
                        self.stage = gr.HTML(views.EMPTY, elem_id="stage", padding=False)
                        self.download = gr.DownloadButton("Download", visible=False, size="sm", elem_id="download")
                        self.jobs = gr.HTML("", elem_id="jobs", padding=False)
                    with gr.Column(elem_id="made"):
                        self._gallery()
            self.outputs = [*self.form.inputs.values(), *self.form.notes.values(), *self.form.sections.values(),
                            self.session, self.message]  # fmt: skip
            self._events(page)
        return page

    def _ask(self) -> None:
        self.form.prompts()
        with gr.Row(elem_id="buttons"):
            self.animate = gr.Button("Animate", variant="primary", size="lg", scale=4, elem_id="animate")
            self.cancel = gr.Button("Cancel", size="lg", scale=1, min_width=100, interactive=False, elem_id="cancel")
        self.message = gr.HTML("", elem_id="message", padding=False)
        self.left_over = gr.Column(visible=bool(self.queue.journal.unfinished), elem_id="unfinished")
        with self.left_over:
            self.left_over_text = gr.HTML(self._unfinished())
            with gr.Row():
                self.resume = gr.Button("Make them now", size="sm", elem_id="resume")
                self.forget = gr.Button("Forget them", size="sm", elem_id="forget")
        with gr.Row(elem_id="examples"):
            gr.HTML("<span>Try</span>", padding=False, min_height=0)
            self.examples = [
                (gr.Button(label, size="sm", min_width=90, elem_classes=["example"]), EXAMPLES / config, entry, prompt)
                for label, config, entry, prompt in EXAMPLE_CLIPS
                if (EXAMPLES / config).is_file()
            ]

    def _tools(self) -> None:
        with gr.Accordion("Settings from a clip", open=False, elem_classes=["section"]):
            self.drop = gr.File(label="A clip or picture", type="filepath", height=120, elem_id="drop")
            self.drop_note = gr.HTML(
                views.help_html(DROP_HELP),
                elem_classes=["note"],
            )
        self.refresh = gr.Button("Look for new files in the model folder", size="sm", elem_id="refresh")

    def _gallery(self) -> None:
        gr.HTML("<h2>Made so far</h2>", padding=False)
        self.gallery = gr.Gallery(
            label="Made so far",
            show_label=False,
            height="auto",
            object_fit="contain",
            elem_id="gallery",
            allow_preview=False,
            buttons=[],
            interactive=False,
        )
        with gr.Column(visible=False, elem_id="chosen") as self.chosen:
            self.shown = gr.HTML("", elem_id="shown", padding=False)
            self.use = gr.Button("Use these settings", size="sm", elem_id="use")
            self.settings = gr.HTML("", elem_id="settings", padding=False)

    # ---- events -----------------------------------------------------------------------------------------------

    def _events(self, page: gr.Blocks) -> None:
        inputs = [self.session, *self.form.inputs.values()]
        looks = [self.seen, self.stage, self.jobs, self.cancel, self.download, self.gallery, self.left_over]
        look: dict[str, Any] = {"fn": self.look, "inputs": [self.session, self.seen], "outputs": looks, **QUIET}
        page.load(self.arrive, [self.session, self.tab], self.session, js=TAB_JS, **QUIET).then(**look)
        page.load(self.rescan, None, [self.form.inputs[name] for name in self._weights()], **QUIET)
        gr.Timer(EVERY).tick(**look, queue=False)
        ask: dict[str, Any] = {"fn": self.submit, "inputs": inputs, "outputs": self.outputs, **QUIET}
        self.animate.click(**ask).then(None, js=SHOW_MISTAKE).then(**look)
        self.form.inputs[PROMPT].submit(**ask).then(None, js=SHOW_MISTAKE).then(**look)
        self.cancel.click(self.call_off, self.session, None, **QUIET).then(**look)
        for button, config, entry, prompt in self.examples:
            fill = partial(self.example, config, entry, prompt)
            button.click(fill, self.session, self.outputs, **QUIET).then(**ask).then(**look)
        weights = [self.form.inputs[name] for name in self._weights()]
        for component in weights:
            component.input(self.check_files, inputs, self.outputs, **QUIET)
        its_own = [self.form.inputs[name] for name in OF_THE_MODEL]
        self.form.inputs["model.base"].input(
            self.other_base, [self.form.inputs["model.base"], *its_own], its_own, **QUIET
        )
        self.drop.upload(self.dropped, [self.session, self.drop], [*self.outputs, self.drop, self.drop_note], **QUIET)
        chosen = [self.session, self.chosen, self.shown, self.settings]
        self.gallery.select(self.choose, [self.session, self.seen], chosen, **QUIET)
        self.use.click(self.use_chosen, self.session, self.outputs, **QUIET)
        self.refresh.click(self.rescan, None, weights, **QUIET)
        self.resume.click(self.make_unfinished, self.session, [self.session, self.left_over], **QUIET).then(**look)
        self.forget.click(self.forget_unfinished, None, self.left_over, **QUIET)

    def arrive(self, session: Session, tab: str) -> Session:
        """A tab is known by a name that it keeps when it is loaded again."""
        return {**session, "tab": tab if 16 <= len(tab or "") <= 64 else secrets.token_hex(16)}

    def request(self, filled: dict[str, Any]) -> Request:
        """What is asked for, checked as the command line checks it.

        Raises:
            Mistakes: all that is wrong.
        """
        found, names = self.places.keep_all(form_fields(), filled)
        try:
            request = read_form(filled)
            if not found:
                (plain,) = with_tagged_loras([request])
                self.places.check(plain)
                check_control_images(plain)
                rehearse(check_requests([plain]))
        except UserError as error:
            raise Mistakes(placed(error, names).found | found) from None
        if found:
            raise Mistakes(found)
        return request

    def submit(self, session: Session, *values: Any) -> dict[Any, Any]:
        """Put a clip into the queue, or say beside the fields why not."""
        session = {"tab": secrets.token_hex(16), **session}
        try:
            request = self.request(dict(zip(self.form.inputs, values, strict=True)))
            if request.sampling.seed == (-1,) and not request.sampling.random_seed:  # what is resumed is the same clip
                request = replace(request, sampling=replace(request.sampling, random_seed=(draw_seed(),)))
            title = first_text(request.prompts.prompt[0]) or "without words"
            self.queue.submit(session["tab"], title, as_values(request, changed_only=True))
        except UserError as error:
            return self._told(session, placed(error).found)
        warnings = " ".join(prompt_warnings(request.prompts))
        return {**self._told(session, {}), self.message: views.help_html(warnings) if warnings else ""}

    def check_files(self, session: Session, *values: Any) -> dict[Any, Any]:
        """Say at once which weight file does not fit."""
        try:
            self.request(dict(zip(self.form.inputs, values, strict=True)))
            found = {}
        except Mistakes as mistakes:
            known = {*session.get("wrong", ()), *self._weights()}
            found = {name: text for name, text in mistakes.found.items() if name in known}
        return self._told(session, found)

    def other_base(self, base: str, *values: Any) -> list[Any]:
        """Of another image model, size and guidance are its own, if they were the bundled one's; and back again."""
        start = [text_of(self.form.start[name]) for name in OF_THE_MODEL]
        bundled = base == self.form.start["model.base"]
        swapped = [(own, "") if not bundled else ("", own) for own in start]
        return [new if value == old else gr.skip() for value, (old, new) in zip(values, swapped, strict=True)]

    def _told(self, session: Session, found: dict[str, str]) -> dict[Any, Any]:
        """Sentences beside the fields; what belongs to none, under the button."""
        updates = self.form.sentences(found, session.get("wrong", ()))
        general = found.get("", "")
        if found and not general:
            count = len(found)
            general = "One thing is to be corrected." if count == 1 else f"{count} things are to be corrected."
        updates[self.message] = views.sentence_html(general)
        updates[self.session] = {**session, "wrong": sorted(found)}
        return updates

    # ---- what is looked at again and again --------------------------------------------------------------------

    def look(self, session: Session, seen: Seen) -> dict[Any, Any]:
        """What has changed for this tab since it last looked."""
        mine = self.queue.of(session.get("tab", ""))
        job = views.current(mine)
        before = {waiting.id: self.queue.before(waiting) for waiting in mine if not waiting.ended}
        last = next((other.result for other in reversed(mine) if other.result), "")
        states = [(j.id, j.state, j.done, j.message, before.get(j.id)) for j in mine]
        now = (states, job and job.id, job and hash(job.preview))
        updates: dict[Any, Any] = {}
        if seen.get("jobs") != now:
            updates[self.stage] = views.stage(job, before.get(job.id, 0) if job else 0, last)
            updates[self.jobs] = views.job_list(mine, before)
            updates[self.cancel] = gr.update(interactive=bool(job and not job.ended))
            file = _one_file(Path(job.result)) if job and job.result else None
            updates[self.download] = gr.update(value=file, visible=file is not None)
            seen = {**seen, "jobs": now}
        if seen.get("finished") != (finished := self.queue.finished):
            clips = self.places.clips(GALLERY)
            updates[self.gallery] = [(str(_picture(clip)), _caption(clip)) for clip in clips]
            updates[self.left_over] = gr.update(visible=bool(self.queue.journal.unfinished))
            seen = {**seen, "finished": finished, "clips": [str(clip) for clip in clips]}
        return {**updates, self.seen: seen if updates else gr.skip()}

    def call_off(self, session: Session) -> None:
        """What the stage shows is not wanted any more."""
        job = views.current(self.queue.of(session.get("tab", "")))
        if job is not None:
            self.queue.cancel(job.owner, [job.id])

    # ---- settings of clips ------------------------------------------------------------------------------------

    def _fill(self, session: Session, request: Request, notes: Iterable[str] = ()) -> dict[Any, Any]:
        updates, lost = self.form.filled(fill_form(one_prompt(request)))
        lines = [*notes, *lost]
        told = self._told(session, {"": " ".join(lines)} if lines else {})
        for component, update in told.items():  # a field may get both a value and its help back
            both = isinstance(update, dict) and component in updates
            updates[component] = {**updates[component], **update} if both else update
        return updates

    def example(self, config: Path, entry: int, prompt: int, session: Session) -> dict[Any, Any]:
        """Fill the form with a prompt of a config that is shipped."""
        return self._fill(session, one_prompt(load_config(config).entries[entry], prompt))

    def dropped(self, session: Session, upload: str) -> dict[Any, Any]:
        """Fill the form with what made an uploaded clip."""
        try:
            request, notes = read_settings(Path(self.places.keep(upload)), self.places, Path(upload).name)
        except UserError as error:
            return {self.drop: None, self.drop_note: views.sentence_html(str(error))}
        note = views.help_html(f"The form is filled with what made {Path(upload).name}.")
        return {**self._fill(session, request, notes), self.drop: None, self.drop_note: note}

    def choose(self, session: Session, seen: Seen, event: gr.SelectData) -> tuple[Session, Any, str, str]:
        """Show what made a clip of the gallery."""
        clips = seen.get("clips", [])
        clip = clips[event.index] if isinstance(event.index, int) and event.index < len(clips) else ""
        try:
            text = dump_yaml(read_metadata(clip)) if clip else ""
        except UserError as error:
            text = str(error)
        settings = f"<pre tabindex='0' aria-label='settings'>{views.escape(text)}</pre>"
        shown = f'<div class="stage">{views.clip(clip, _caption(Path(clip)))}</div>'
        return {**session, "chosen": clip}, gr.update(visible=bool(clip)), shown, settings

    def use_chosen(self, session: Session) -> dict[Any, Any]:
        """Fill the form with what made the clip that was chosen."""
        try:
            request, notes = read_settings(Path(session.get("chosen", "")), self.places)
        except UserError as error:
            return {self.message: views.sentence_html(str(error))}
        return self._fill(session, request, notes)

    def rescan(self) -> list[Any]:
        """Offer what has come into the model folder."""
        self.places.scan()
        return [gr.update(choices=self.places.offers(form_fields()[name])) for name in self._weights()]

    @staticmethod
    def _weights() -> list[str]:
        """The fields for weight files."""
        return [name for name, field in form_fields().items() if field.takes == "file"]

    # ---- what an earlier run left -----------------------------------------------------------------------------

    def _unfinished(self) -> str:
        jobs = self.queue.journal.unfinished
        names = "".join(f"<li>{views.escape(views.shortened(job.title))}</li>" for job in jobs[:8])
        more = f"<li>… and {len(jobs) - 8} more</li>" if len(jobs) > 8 else ""
        count = "One clip was" if len(jobs) == 1 else f"{len(jobs)} clips were"
        return f'<p role="status">{count} not finished when the page was last stopped:</p><ul>{names}{more}</ul>'

    def make_unfinished(self, session: Session) -> tuple[Session, Any]:
        """Put it into the queue, as this tab's."""
        session = {"tab": secrets.token_hex(16), **session}
        self.queue.resume(session["tab"])
        return session, gr.update(visible=bool(self.queue.journal.unfinished))

    def forget_unfinished(self) -> Any:
        self.queue.journal.forget()
        return gr.update(visible=False)


def _picture(clip: Path) -> Path:
    """What the gallery shows of a clip; of a folder of pictures the first."""
    return min(clip.glob("*.png"), default=clip) if clip.is_dir() else clip


def _one_file(clip: Path) -> str:
    """A clip to download; a folder of pictures as an archive."""
    if not clip.is_dir():
        return str(clip)
    return shutil.make_archive(os.path.join(get_upload_folder(), clip.parents[1].name), "zip", clip)


def _caption(clip: Path) -> str:
    return " ".join(clip.stem.split("-")[1:]) or clip.stem
