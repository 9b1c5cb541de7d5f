"""The style sheet of a report, light and dark, from a phone to a wide screen, and its page."""

from typing import Any

from vlm_jax.data.inspect import COLOURS
from vlm_jax.report.html import Html, tag

# Nothing may be loaded, whatever the page holds: styles are its own, pictures are data.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
KINDS = "".join(f".k-{kind}{{--k:rgb{colour}}}" for kind, colour in COLOURS.items())

CSS = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c1e21;--soft:#5f666f;--line:#e3e5e8;
--mark:#fff3c9;--c0:#2563c9;--c1:#d4572a;--c2:#15803d;--c3:#8b45c4;--c4:#0e7490;--c5:#b1356b}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1c1f25;--ink:#e7e9ec;--soft:#9aa3ae;
--line:#323740;--mark:#4a3f12;--c0:#6ea3ff;--c1:#ff9466;--c2:#5bc987;--c3:#c79bf2;--c4:#4fc3dc;
--c5:#f08cb4}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 20px 64px;max-width:1360px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.65rem;margin:0;line-height:1.2}
h2{font-size:1.2rem;margin:44px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:24px 0 8px}
p{margin:6px 0}.muted,figcaption,.lead{color:var(--soft)}.lead{margin:6px 0 18px}
nav{margin:14px 0 20px;display:flex;flex-wrap:wrap;gap:4px 16px}nav a{color:var(--c0)}
a{color:inherit}
code,.tokens,pre{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",
monospace}
pre,code{font-size:.85rem;white-space:pre-wrap}
.tiles,.charts,.cards,.pair{display:grid;gap:14px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr))}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr))}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.tile,figure,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0;
padding:12px 14px}
.tile b{display:block;font-size:1.45rem;line-height:1.25}
.tile span{color:var(--soft);font-size:.85rem}
figcaption{font-size:.85rem}figcaption b{color:var(--ink);font-size:.95rem}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.85rem;
margin:4px 0 8px;color:var(--soft)}
.legend b{color:var(--ink);font-weight:600}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;
background:var(--k)}
svg{display:block;width:100%;height:auto;overflow:visible;font-size:12px;fill:var(--soft)}
.grid{stroke:var(--line)}.rule{stroke:var(--soft);stroke-dasharray:3 3}
.end{text-anchor:end}.middle{text-anchor:middle}
.line{fill:none;stroke:var(--k);stroke-width:2;stroke-linejoin:round}.dot{fill:var(--k)}
.span{stroke:var(--soft);stroke-width:3;stroke-linecap:round}
.band{fill:transparent}.tip{display:none;pointer-events:none}.point:hover .tip{display:block}
.box{fill:var(--card);stroke:var(--line)}.tip text{fill:var(--ink)}
.interval{width:120px}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}
.c5{--k:var(--c5)}
.stack{display:flex;height:26px;border-radius:6px;overflow:hidden;border:1px solid var(--line)}
.stack span{background:var(--k);min-width:1px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{text-align:left;color:var(--soft);font-weight:600}
th,td{padding:6px 12px;border-bottom:1px solid var(--line);vertical-align:middle}
tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
table{overflow-wrap:normal}
td code{overflow-wrap:anywhere;display:inline-block;min-width:6em}
.changed{background:var(--mark);border-radius:4px;padding:0 4px}
.sub{padding-left:14px;white-space:nowrap;color:var(--soft)}
.mask{display:block;width:100%;height:auto;image-rendering:pixelated;margin-bottom:8px}
.tokens{font-size:.82rem;line-height:1.9;white-space:pre-wrap;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:8px 12px;max-height:11.5em;overflow-y:auto}
.tokens span{border-bottom:3px solid var(--k);margin-right:1px}
.tokens .k-image{background:var(--k);color:#fff;border-radius:4px;padding:1px 6px;border:0}
.card{display:flex;gap:14px}.card>div{min-width:0}
.maps{display:grid;gap:14px;margin-top:14px}
.pixel{width:96px;height:96px;object-fit:contain;image-rendering:pixelated;border-radius:6px;flex:none}
.card p{margin:0 0 2px}.asked{color:var(--soft)}.yes,.no{font-weight:600;font-size:1.05rem}
.yes{color:var(--c2)}.no{color:var(--c1)}.card .muted{font-size:.85rem}
details{margin:10px 0}summary{cursor:pointer;color:var(--c0)}
""" + KINDS


def document(title: str, body: Any) -> str:
  """A whole page: its elements of the body, with nothing in it that could load or run."""
  head = [
    tag("meta", charset="utf-8"),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
    tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
    tag("link", rel="icon", href="data:,"),
    tag("title", title), tag("style", Html(CSS)),
  ]
  return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"
