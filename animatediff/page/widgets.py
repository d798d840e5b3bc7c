"""Fields as Gradio's components, and what is written beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import gradio as gr

from animatediff.page.fields import MORE, NEGATIVE, PROMPT, SECTIONS, TRAVEL, Field, form_fields
from animatediff.page.places import Places
from animatediff.page.views import help_html, picture_of, sentence_html
from animatediff.utils import UserError

TRAVEL_HELP = "Texts to travel between, at frames; the prompt above stands at frame 0."
MORE_HELP = "Any other option, key=value, a line for each, as on the command line: pag.layers=[mid_block]"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Form:
    """The components of all fields, by name, inside the layout that is being built.

    Attributes:
        inputs: by field, in the order that events get them.
        notes: by field, the line under a component that has none of its own.
        sections: the folded parts, by title.
    """

    def __init__(self, places: Places, start: Mapping[str, Any]):
        self.places, self.start = places, start
        self.inputs: dict[str, Any] = {}
        self.notes: dict[str, gr.HTML] = {}
        self.sections: dict[str, gr.Accordion] = {}

    # ---- building ---------------------------------------------------------------------------------------------

    def prompts(self) -> None:
        """The two texts on top."""
        self.inputs[PROMPT] = gr.Textbox(
            self.start[PROMPT], label="Prompt", info=self.help(PROMPT), lines=3, max_lines=8, elem_id="prompt"
        )
        self.inputs[NEGATIVE] = gr.Textbox(
            self.start[NEGATIVE], label="Negative prompt", info=self.help(NEGATIVE), max_lines=4, elem_id="negative"
        )

    def folded(self) -> None:
        """All sections, and the field for what has none."""
        for section in SECTIONS:
            with gr.Accordion(section.title, open=False, elem_classes=["section"]) as self.sections[section.title]:
                for entry, names in groupby(section.of, entry_of):
                    with gr.Column(visible=self._wanted(entry)) as column:
                        self._rows(names)
                    self._reveal(entry, column)
        with gr.Accordion("More options", open=False, elem_classes=["section"]) as self.sections["More options"]:
            self.inputs[MORE] = gr.Textbox(
                self.start[MORE], label="More options", info=MORE_HELP, lines=2, elem_id="more"
            )

    def _rows(self, names: Iterable[str]) -> None:
        """Components two in a row; a file and its scale together, media, texts and tables alone."""
        waiting: list[str] = []

        def flush() -> None:
            with gr.Row(equal_height=False, visible=bool(waiting)):
                for name in waiting:
                    self._put(name)
            waiting.clear()

        for name in names:
            takes = form_fields()[name].takes if name in form_fields() else "table"
            alone = takes in ("table", "text", "media", "medias") or (takes == "file" and "[" not in name)
            if waiting and (alone or name.endswith("path")):
                flush()
            if alone:
                self._put(name)
                continue
            waiting.append(name)
            if len(waiting) == 2:
                flush()
        if waiting:
            flush()

    def _wanted(self, entry: str) -> bool:
        """Whether an entry of a list is to be seen: the first one, and one whose neighbour before has a file."""
        return not (before := _before(entry)) or bool(self.start.get(before))

    def _reveal(self, entry: str, column: gr.Column) -> None:
        """The next entry of a list appears with a file in the one before, and stays while it has one itself."""
        if before := _before(entry):
            files = [self.inputs[before], self.inputs[f"{entry}.path"]]
            files[0].change(lambda *paths: gr.update(visible=any(paths)), files, column, **QUIET)

    def _put(self, name: str) -> None:
        if name == TRAVEL:
            self.inputs[name] = gr.Dataframe(
                padded(self.start[TRAVEL]), headers=["frame", "prompt"], datatype=["number", "str"], type="array",
                column_count=2, label="Keyframes", interactive=True, column_widths=["20%", "80%"], buttons=[],
                elem_id="travel",
            )  # fmt: skip
            self.notes[name] = gr.HTML(help_html(TRAVEL_HELP), elem_classes=["note"])
            return
        field, value = form_fields()[name], self.start.get(name)
        common: dict[str, Any] = {"label": field.label, "elem_id": element_id(name)}
        if field.takes in ("media", "medias"):
            many = "multiple" if field.takes == "medias" else "single"
            self.inputs[name] = gr.File(file_count=many, type="filepath", height=120, **common)
            self.notes[name] = gr.HTML(help_html(field.help), elem_classes=["note"])
            self.inputs[name].change(partial(self._seen, field), self.inputs[name], self.notes[name], **QUIET)
            return
        common |= {"info": field.help, "min_width": 140}
        if field.takes == "file":
            self.inputs[name] = gr.Dropdown(self.places.offers(field), value=value or "", **common)
        elif field.takes == "choice":
            choices = [(str(choice) or "default", choice) for choice in field.choices]
            if name in ("windows.schedule", "loop.mode"):
                choices[0] = ("off", "")
            self.inputs[name] = gr.Dropdown(choices, value=value, filterable=False, **common)
        elif field.takes == "switch":
            self.inputs[name] = gr.Checkbox(bool(value), **common)
        elif field.takes == "slider":
            self.inputs[name] = gr.Slider(field.least, field.most, value, step=0.01, **common)
        elif field.takes in ("number", "whole") and field.default is not None:  # an empty gr.Number becomes 0
            self.inputs[name] = gr.Number(value, step=1 if field.takes == "whole" else 0.1, **common)
        else:
            lines = 6 if field.takes == "text" else 1
            placeholder = "default" if field.default is None else None
            self.inputs[name] = gr.Textbox(text_of(value), max_lines=lines, placeholder=placeholder, **common)

    # ---- what is beside them ----------------------------------------------------------------------------------

    @staticmethod
    def help(name: str) -> str:
        """The line beside a field while nothing is wrong with it."""
        texts = {PROMPT: "What to show.", NEGATIVE: "What to avoid.", TRAVEL: TRAVEL_HELP, MORE: MORE_HELP}
        return texts.get(name) or form_fields()[name].help

    def _seen(self, field: Field, uploads: str | list[str] | None) -> str:
        """The note of a file field after an upload: small pictures of the files, or what is wrong with them."""
        pictures = []
        for upload in [uploads] if isinstance(uploads, str) else uploads or []:
            try:
                pictures.append(picture_of(self.places.keep(upload), field.label))
            except UserError as error:
                return sentence_html(str(error))
        return "".join(pictures) + help_html(field.help)

    def sentences(self, found: Mapping[str, str], before: Iterable[str]) -> dict[Any, Any]:
        """Updates that show each sentence beside its field and unfold its section; and take those before away."""
        updates: dict[Any, Any] = {}
        for name in {*found, *before} & self.inputs.keys():
            text = found.get(name)
            if name in self.notes:
                updates[self.notes[name]] = sentence_html(text) if text else help_html(self.help(name))
            else:
                updates[self.inputs[name]] = gr.update(
                    info=text or self.help(name), elem_classes=["wrong"] if text else []
                )
        for section in SECTIONS:
            if any(name in found for name in section.of):
                updates[self.sections[section.title]] = gr.update(open=True)
        if MORE in found:
            updates[self.sections["More options"]] = gr.update(open=True)
        return updates

    def filled(self, values: Mapping[str, Any]) -> tuple[dict[Any, Any], list[str]]:
        """Updates that put values into all fields; and what could not be: files that are not offered."""
        updates, lost = {}, []
        for name, component in self.inputs.items():
            value = values.get(name)
            field = form_fields().get(name)
            if name == TRAVEL:
                value = padded(value)
            elif field and field.takes == "file" and value:
                if value not in [path for _, path in self.places.offers(field)]:
                    lost.append(f"{field.option}: there is no {value} among the files that are offered")
                    value = ""
            elif field and field.takes in ("media", "medias") and value:
                wanted = [value] if isinstance(value, str) else value
                if missing := [path for path in wanted if self.places.find_media(path) is None]:
                    lost.append(f"{field.option}: there is no {missing[0]} in the folders of this page")
                there = []
                for found in filter(None, map(self.places.find_media, wanted)):
                    try:
                        there.append(self.places.keep(found))
                    except UserError as error:
                        lost.append(f"{field.option}: {error}")
                value = (there if field.takes == "medias" else there[0]) if there else None
            elif isinstance(component, gr.Textbox):
                value = text_of(value)
            updates[component] = gr.update(value=value)
        return updates, lost


def entry_of(name: str) -> str:
    """`model.loras[1]` of `model.loras[1].scale`; "" of a field that is of no entry."""
    return name.rpartition(".")[0] if "[" in name else ""


def _before(entry: str) -> str:
    """The file's field of the entry before this one; "" of the first, or of none."""
    option, _, place = entry.removesuffix("]").partition("[")
    return f"{option}[{int(place) - 1}].path" if place and int(place) else ""


def text_of(value: Any) -> str:
    """A value in a field for text; numbers as people write them."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def padded(rows: Iterable[Any] | None, least: int = 3) -> list[list[Any]]:
    """The rows of a table with some empty ones."""
    rows = [list(row) for row in rows or ()]
    return rows + [[None, ""] for _ in range(max(least - len(rows), 1))]


def element_id(name: str) -> str:
    """Of a field, for style and tests."""
    return "f-" + name.replace(".", "-").replace("[", "-").replace("]", "")
