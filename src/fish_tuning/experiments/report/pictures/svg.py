"""A picture as SVG inside a page: it follows the page's colours and font, and is read aloud by its title."""

from __future__ import annotations

import io
import re
from collections import Counter
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from markupsafe import Markup

from fish_tuning.experiments.report.look import PALETTE, plain
from fish_tuning.experiments.report.pictures.canvas import Picture, style

_VARIABLES = {colour.light: f"var(--{name})" for name, colour in PALETTE.items()}
_SAID_ANYWAY = re.compile(r"font-family:[^;]*|stroke-dashoffset: 0|stroke-linejoin: round|stroke-linecap: butt")
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg(picture: Picture, name: str) -> Markup:
    """The `<svg>` element. `name` is another one for each SVG of a page: ids begin with it.

    Without a title, it is hidden from who hears the page.
    """
    content = io.BytesIO()
    with style():
        picture.figure.savefig(content, format="svg", transparent=True, metadata=_NO_METADATA)
    drawn = ElementTree.fromstring(content.getvalue())
    width, height = (float(side) for side in drawn.attrib["viewBox"].split()[2:])
    root = Element("svg", _attributes(picture, width, height))
    if picture.title:
        SubElement(root, "title").text = plain(picture.title)
        SubElement(root, "desc").text = plain(picture.description)
    root.extend(part for child in drawn for part in _parts(child, picture))
    _write_out_single_uses(root)
    _rename_ids(root, name)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attributes(picture: Picture, width: float, height: float) -> dict[str, str]:
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    if not picture.title:
        return {**size, "class": f"drawn {picture.kind}", "aria-hidden": "true"}
    said = plain(f"{picture.title}. {picture.description}")
    return {**size, "class": f"drawn {picture.kind}", "role": "img", "aria-label": said}


def _parts(node: Element, picture: Picture) -> list[Element]:
    """What stays of an element: nothing of metadata and invisible paths, of a group without meaning its children."""
    tag = node.tag.rpartition("}")[2]
    children = [part for child in node for part in _parts(child, picture)]
    attributes = {key.rpartition("}")[2]: _shorter(key, value) for key, value in node.attrib.items()}
    if tag in ("metadata", "style") or (tag in ("g", "defs") and not children):
        return []
    if tag == "g":
        return _group(attributes, children, picture)
    if attributes.get("style") == "fill:none":
        return []
    if attributes.get("transform", "").startswith("rotate(-0"):
        del attributes["transform"]
    part = Element(tag, attributes)
    part.extend(children)
    part.text = node.text if tag == "text" else None
    return [part]


def _group(attributes: dict[str, str], children: list[Element], picture: Picture) -> list[Element]:
    gid = attributes.pop("id", "")
    word, _, number = gid.rpartition("-")
    if number.isdecimal():
        attributes["class"] = word
    if not attributes:
        return children
    group = Element("g", attributes)
    if gid in picture.told:
        SubElement(group, "title").text = plain(picture.told[gid])
    group.extend(children)
    return [group]


def _shorter(key: str, value: str) -> str:
    """Hundredths of a pixel are enough, and colours that the page names are called by its names."""
    if key.endswith(("href", "id")):
        return "".join(value.split())
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    if key == "d":
        return re.sub(r"\s*([A-Za-z])\s*", r"\1", text).strip()
    text = re.sub(r"#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour[0], colour[0]), text)
    if key == "style":
        return ";".join(
            part for item in _SAID_ANYWAY.sub("", text).split(";") if (part := item.strip().replace(": ", ":"))
        )
    return text


def _write_out_single_uses(root: Element) -> None:
    """A shape that is used once stands where it is used: shorter, and a legend's marks then need no ids."""
    used = Counter(use.attrib["href"][1:] for use in root.iter("use"))
    shapes = {
        path.attrib["id"]: (defs, path)
        for defs in root.iter("defs")
        for path in defs.findall("path")
        if used[path.attrib["id"]] == 1
    }
    for parent in list(root.iter()):
        for place, use in enumerate(parent):
            if use.tag == "use" and use.attrib["href"][1:] in shapes:
                defs, path = shapes[use.attrib["href"][1:]]
                defs.remove(path)
                style = ";".join(part for each in (use, path) if (part := each.attrib.get("style")))
                at = f"translate({use.attrib['x']} {use.attrib['y']})"
                parent[place] = Element("path", {"d": path.attrib["d"], "transform": at, "style": style})
        for defs in [child for child in parent if child.tag == "defs" and not len(child)]:
            parent.remove(defs)


def _rename_ids(root: Element, name: str) -> None:
    """Only what is referred to keeps an id, one that no other SVG of the page has."""
    written = ElementTree.tostring(root, encoding="unicode")
    used = dict.fromkeys(re.findall(r'(?:url\(#|href="#)([\w.-]+)', written))
    new = {old: f"{name}-{number}" for number, old in enumerate(used)}
    for node in root.iter():
        for key, value in node.attrib.items():
            if key == "id":
                node.attrib[key] = new.get(value, "")
            else:
                node.attrib[key] = re.sub(
                    r"(url\(#|^#)([\w.-]+)", lambda found: found[1] + new.get(found[2], found[2]), value
                )
        if node.attrib.get("id") == "":
            del node.attrib["id"]
