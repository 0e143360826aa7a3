"""Style and script of pages, and the style of charts on pages and in separate files.

A page is complete without the script, which lets the reader hide rows by a legend and bring one out by pointing at it, says which tables
scroll, and saves a figure's data.
"""

from __future__ import annotations

from string import Template

__all__ = ["CHART_STYLE", "PAGE_STYLE", "SCRIPT", "VIEW_STYLE"]

NAMES = "ink soft paper panel edge warn good bad c0 c1 c2 c3 c4 c5 c6 c7"
"""Names of colours; c0 to c5 are those of Okabe and Ito, which colour-blind readers can distinguish."""
ON_LIGHT = "#1c1e21 #5b616b #fff #f4f5f7 #dfe2e6 #fdf3ec #1a7f37 #cf222e #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #1c1e21 #8b8f94"
ON_DARK = "#e8eaed #a3a9b2 #15171a #1f2226 #363a40 #33241a #4cc26a #ff7b72 #4fa3dc #f0773a #2fc79a #e09bc4 #f0b429 #9bd6f7 #e8eaed #8b8f94"
LIGHT, DARK = (dict(zip(NAMES.split(), colours.split(), strict=True)) for colours in (ON_LIGHT, ON_DARK))

FORMS = """
svg text{font-family:system-ui,sans-serif} .title{font-size:14px;font-weight:600} .head{font-size:12.5px;font-weight:600}
svg .tick{font-size:11px;font-weight:400} .name,.item{font-size:11.5px} svg .note{font-size:10.5px}
.grid,.axis,.rule,.line,.bar,.mean,.published,.unknown{fill:none} .rule{stroke-dasharray:2 3}
.line{stroke:currentColor;stroke-width:1.8;stroke-linejoin:round} .d1 .line{stroke-dasharray:7 3} .d2 .line{stroke-dasharray:2 2.5}
.d3 .line{stroke-dasharray:8 3 2 3} .band{fill:currentColor;opacity:.15} .dot{fill:currentColor} .bar{stroke:currentColor;stroke-width:1.4}
.range{fill:currentColor;opacity:.28} .run{fill:currentColor;opacity:.75} .mean{stroke:currentColor;stroke-width:2.5}
.published{stroke-width:1.4} .unknown{stroke-dasharray:3}
"""
INKS = Template(
    "svg text,svg .item{fill:$ink} svg .tick,svg .name,svg .note{fill:$soft} .ground{fill:$paper} .grid{stroke:$edge}"
    " .axis,.rule,.unknown{stroke:$soft} .published{stroke:$ink} .beyond{fill:$soft} .none{fill:$panel} .cell{fill:$c0}\n"
    + " ".join(f".c{number}{{color:$c{number}}}" for number in range(8))
    + "\n"
)
CHART_STYLE = f"{FORMS}{INKS.substitute(LIGHT)}@media screen and (prefers-color-scheme:dark){{{INKS.substitute(DARK)}}}\n"
"""Style of an SVG file: without variables, which drawing programs do not support."""

PAGE = """
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;max-width:100rem;margin:0 auto;padding:2rem 1.5rem 4rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:1.6rem 0 .5rem;overflow-wrap:anywhere} p,ul.said{max-width:60rem;margin:.6rem 0;overflow-wrap:anywhere}
ul.said{padding-left:1.2rem} .said li{margin:.25rem 0}
header{display:flow-root} header:has(aside) p,header:has(aside) ul.said{max-width:none}
aside{float:right;width:min(28rem,38%);margin:.2rem 0 1rem 2.5rem;padding:.4rem 1rem;background:var(--panel);border-radius:4px}
aside table{width:100%;font-size:.85rem} aside td{border-bottom:1px solid var(--edge)} aside tr:last-child td{border:0}
aside .facts td:first-child{background:none;color:var(--soft);white-space:nowrap;position:static;min-width:0;width:1%}
aside .facts td{white-space:normal;min-width:0;overflow-wrap:anywhere} aside .scroll{background:none;margin:0}
.quote{font-size:1.06rem;border-left:4px solid var(--c0);padding:.1rem 0 .1rem .9rem}
.lead,.note,nav{color:var(--soft)} .note{font-size:.875rem} .notes{white-space:pre-line}
.note.long{max-width:none;columns:30rem 3;column-gap:2.5rem} header .note.long{columns:auto}
.changed{border-left:4px solid var(--c1);padding:.5rem .9rem;background:var(--warn);font-weight:600;border-radius:0 4px 4px 0}
nav{font-size:.875rem;margin:1.2rem 0 0;padding:.5rem 0;border-top:1px solid var(--edge);border-bottom:1px solid var(--edge)}
nav a{color:inherit;margin-right:1.1rem;white-space:nowrap;text-decoration:none} nav a:hover{text-decoration:underline}
.scroll{overflow-x:auto;margin:.6rem 0;-webkit-overflow-scrolling:touch;background:
linear-gradient(to right,var(--paper),var(--paper)) 0/1.5rem 100% no-repeat local,
linear-gradient(to left,var(--paper),var(--paper)) 100%/1.5rem 100% no-repeat local,
linear-gradient(to right,var(--edge),transparent) 0/.9rem 100% no-repeat scroll,
linear-gradient(to left,var(--edge),transparent) 100%/.9rem 100% no-repeat scroll}
.hint{margin:.6rem 0 -.4rem;font-size:.8rem;color:var(--soft)} .hint[hidden]{display:none}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;min-width:40%}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap}
th{font-weight:600;white-space:normal;vertical-align:bottom} thead th{border-bottom:2px solid var(--ink)}
th.words,td.words,th:first-child,td:first-child{text-align:left} td.words{white-space:normal}
th:first-child,td:first-child{padding-left:0;position:sticky;left:0;background:var(--paper);z-index:1}
td.long{white-space:normal;min-width:16rem;max-width:44rem;overflow-wrap:anywhere}
td.long:first-child{min-width:13rem;max-width:18rem}
.facts td{vertical-align:top} .facts td.long{max-width:60rem} .facts .note{margin:0;color:var(--soft)}
.good{color:var(--good);font-weight:600} .bad{color:var(--bad);font-weight:600} .open{color:var(--soft);font-weight:600}
td.up{background:color-mix(in srgb,var(--c0) calc(var(--t)*45%),transparent)}
td.down{background:color-mix(in srgb,var(--c4) calc(var(--t)*45%),transparent)}
pre{font:.85rem/1.5 ui-monospace,monospace;background:var(--panel);border-radius:4px;padding:.6rem .8rem;margin:.6rem 0;
white-space:pre-wrap;overflow-wrap:anywhere} summary{cursor:pointer;color:var(--soft)}
figure{margin:.8rem 0 1.4rem} figcaption{color:var(--soft);font-size:.875rem;max-width:60rem;margin-top:.3rem}
.data{font-size:.85rem;margin-top:.3rem} .data pre{max-height:20rem;overflow:auto;white-space:pre;overflow-wrap:normal;font-size:.75rem}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:.8rem 1rem;align-items:start}
.many .panels{grid-template-columns:repeat(auto-fit,minmax(min(100%,32rem),1fr))}
.ring{fill:none;stroke:currentColor;stroke-width:1.4}
.panel .faint{opacity:.3} .panel .faint .line{stroke-width:1.1} .panel .faint .band{opacity:.05}
.panels svg{width:100%;height:auto} .strip{display:block;width:100%;min-width:11rem;height:auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1rem;padding:0;margin:.2rem 0 .5rem;font-size:.85rem}
.many .legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr))}
.legend li{display:flex;align-items:center;gap:.35rem;max-width:100%} .legend span{overflow-wrap:anywhere} .legend svg{flex:none}
.legend [role=button]{cursor:pointer;border-radius:3px} .legend [role=button]:hover{background:var(--panel)}
.legend .faint span{color:var(--soft)} .legend [aria-pressed=false] svg{opacity:.25}
.legend [aria-pressed=false] span{text-decoration:line-through;color:var(--soft)} .gone{display:none}
.out .panel [data-row]{opacity:.1} .out .panel [data-row].on{opacity:1}
.do{font:inherit;font-size:.8rem;color:var(--soft);background:none;border:1px solid var(--edge);border-radius:3px;padding:.1rem .5rem;
margin:.2rem .4rem .2rem 0;cursor:pointer} .do:hover{color:var(--ink)}
.key{vertical-align:-1px;margin-right:.35rem}
@media (max-width:900px){header{display:flex;flex-direction:column} aside{order:1;float:none;width:auto;margin:.6rem 0}}
@media (max-width:600px){body{padding:1rem 1rem 3rem} h1{font-size:1.35rem}
th,td{padding:.35rem .5rem} td.words{min-width:9rem} td.words:first-child{min-width:0}
.facts td.long{min-width:11rem} .facts td{overflow-wrap:anywhere}
.facts td.words{min-width:5.5rem} .facts :is(th,td):first-child{min-width:0}
th:first-child,td:first-child{min-width:7.5rem;max-width:9rem;white-space:normal} td.long:first-child{min-width:9rem}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--edge:#ccc;--panel:#f4f4f4;--warn:#fff}
body{max-width:none;font-size:10.5pt;padding:0} nav,.data,.hint,.do{display:none} .scroll{overflow:visible;background:none}
table{font-size:8pt} th,td{padding:.2rem .35rem}
th:first-child,td:first-child{position:static} figure,tr,svg{break-inside:avoid} h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;height:auto}}
"""


def _variables(palette: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in palette.items())


PAGE_STYLE = (
    f"\n:root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    f"{FORMS}{INKS.substitute({name: f'var(--{name})' for name in LIGHT})}{PAGE}"
)

VIEW_STYLE = (
    f".bpfree-view{{color-scheme:light;{_variables(LIGHT)};font:14px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);"
    "padding:.6rem .8rem;border-radius:4px;max-width:60rem;"
    f"{FORMS}{INKS.substitute({name: f'var(--{name})' for name in LIGHT})}{PAGE}}}\n"
    f"@media (prefers-color-scheme:dark){{.bpfree-view{{color-scheme:dark;{_variables(DARK)}}}}}\n"
    f"[data-jp-theme-light=true] .bpfree-view,.vscode-light .bpfree-view{{color-scheme:light;{_variables(LIGHT)}}}\n"
    f"[data-jp-theme-light=false] .bpfree-view,.vscode-dark .bpfree-view{{color-scheme:dark;{_variables(DARK)}}}\n"
    ".bpfree-view h3{margin-top:0} .bpfree-view .legend{margin-left:0} .bpfree-view table{margin-left:0}\n"
)
"""Style of a view: that of a page, nested in it, so that nothing else on the notebook's page changes."""

SCRIPT = """
(function(){
function all(root,what){return Array.prototype.slice.call(root.querySelectorAll(what));}
function button(text,act){
  var made=document.createElement("button");
  made.type="button";made.className="do";made.textContent=text;made.addEventListener("click",act);
  return made;
}
all(document,"figure").forEach(function(figure,place){
  var items=all(figure,".legend li");
  function drawn(row){return all(figure,".panel [data-row]").filter(function(g){return g.dataset.row===row;});}
  function show(item,shown){
    item.setAttribute("aria-pressed",String(shown));
    drawn(item.dataset.row).forEach(function(g){g.classList.toggle("gone",!shown);});
  }
  function bring(row){
    figure.classList.toggle("out",row!==null);
    all(figure,".panel [data-row]").forEach(function(g){g.classList.toggle("on",g.dataset.row===row);});
  }
  function point(at){
    at.addEventListener("pointerenter",function(e){if(e.pointerType==="mouse")bring(at.dataset.row);});
    at.addEventListener("pointerleave",function(){bring(null);});
  }
  items.forEach(function(item){
    function toggle(){show(item,item.getAttribute("aria-pressed")!=="true");}
    item.setAttribute("role","button");item.setAttribute("tabindex","0");item.setAttribute("aria-pressed","true");
    item.title="show or hide";
    item.addEventListener("click",toggle);
    item.addEventListener("keydown",function(e){if(e.key==="Enter"||e.key===" "){e.preventDefault();toggle();}});
    point(item);
  });
  if(items.length>1)all(figure,".panel [data-row]").forEach(point);
  if(figure.classList.contains("many")){
    var panels=figure.querySelector(".panels");
    [["show all",true],["hide all",false]].forEach(function(each){
      figure.insertBefore(button(each[0],function(){items.forEach(function(item){show(item,each[1]);});}),panels);
    });
  }
  var data=figure.querySelector(".data pre");
  if(data)data.parentNode.insertBefore(button("Save as CSV",function(){
    var link=document.createElement("a");
    link.href=URL.createObjectURL(new Blob([data.textContent],{type:"text/csv"}));
    link.download="figure-"+(place+1)+".csv";link.click();URL.revokeObjectURL(link.href);
  }),data);
});
var boxes=all(document,".scroll").map(function(box){
  var hint=document.createElement("p");
  hint.className="hint";hint.hidden=true;hint.textContent="\u2194 this table scrolls sideways";
  box.parentNode.insertBefore(hint,box);
  return {box:box,hint:hint};
});
function look(){boxes.forEach(function(one){
  if(one.box.clientWidth)one.hint.hidden=one.box.scrollWidth<=one.box.clientWidth+1;
});}
look();window.addEventListener("resize",look);
all(document,"details").forEach(function(one){one.addEventListener("toggle",look);});
})();
"""
