"""Style and script of a report's page. The page is complete without the script, which only lets a legend hide its rows."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#5b616b;--paper:#fff;--panel:#f4f5f7;--edge:#dfe2e6;--warn:#fdf3ec;
--c0:#0072B2;--c1:#D55E00;--c2:#009E73;--c3:#CC79A7;--c4:#E69F00;--c5:#56B4E9;--c6:#1c1e21;--c7:#8b8f94}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3a9b2;--paper:#15171a;--panel:#1f2226;--edge:#363a40;--warn:#33241a;
--c0:#4fa3dc;--c1:#f0773a;--c2:#2fc79a;--c3:#e09bc4;--c4:#f0b429;--c5:#9bd6f7;--c6:#e8eaed;--c7:#8b8f94}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;max-width:76rem;margin:0 auto;padding:2rem 1rem 4rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:1.6rem 0 .5rem;overflow-wrap:anywhere} p,ul.said{max-width:52rem;margin:.6rem 0;overflow-wrap:anywhere}
ul.said{padding-left:1.2rem} .said li{margin:.25rem 0}
.lead,.note,nav{color:var(--soft)} .note{font-size:.875rem} .notes{white-space:pre-line}
.changed{border-left:4px solid var(--c1);padding:.5rem .9rem;background:var(--warn);font-weight:600;border-radius:0 4px 4px 0}
nav{font-size:.875rem;margin:1.2rem 0 0;padding:.5rem 0;border-top:1px solid var(--edge);border-bottom:1px solid var(--edge)}
nav a{color:inherit;margin-right:1.1rem;white-space:nowrap;text-decoration:none} nav a:hover{text-decoration:underline}
.scroll{overflow-x:auto;margin:.6rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;min-width:40%}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap}
th{font-weight:600;white-space:normal;vertical-align:bottom} thead th{border-bottom:2px solid var(--ink)}
th.words,td.words,th:first-child,td:first-child{text-align:left}
th:first-child,td:first-child{padding-left:0;position:sticky;left:0;background:var(--paper);z-index:1}
td.long{white-space:normal;min-width:16rem;max-width:34rem;overflow-wrap:anywhere}
td.long:first-child{min-width:13rem;max-width:18rem}
td.up{background:color-mix(in srgb,var(--c0) calc(var(--t)*45%),transparent)}
td.down{background:color-mix(in srgb,var(--c4) calc(var(--t)*45%),transparent)}
code,pre{font:.85rem/1.5 ui-monospace,monospace;background:var(--panel);border-radius:4px} code{padding:.1rem .3rem;overflow-wrap:anywhere}
pre{padding:.6rem .8rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:.6rem 0} summary{cursor:pointer;color:var(--soft)}
figure{margin:.8rem 0 1.4rem} figcaption{color:var(--soft);font-size:.875rem;max-width:52rem;margin-top:.3rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.8rem 1rem;align-items:start}
.panels svg{width:100%;height:auto;max-width:34rem}
svg text{font-family:system-ui,sans-serif;fill:var(--ink)} .head{font-size:12.5px;font-weight:600} .tick{font-size:11px;font-weight:400}
.panel .tick,.strip .tick,svg .name,svg .note{fill:var(--soft)} .name{font-size:11.5px} svg .note{font-size:10.5px}
.grid{stroke:var(--edge);stroke-width:1;fill:none} .axis{stroke:var(--soft);stroke-width:1;fill:none}
.rule{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3;fill:none}
.c0{--c:var(--c0)} .c1{--c:var(--c1)} .c2{--c:var(--c2)} .c3{--c:var(--c3)} .c4{--c:var(--c4)} .c5{--c:var(--c5)} .c6{--c:var(--c6)}
.c7{--c:var(--c7)} .line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round} .d1 .line{stroke-dasharray:7 3}
.d2 .line{stroke-dasharray:2 2.5} .d3 .line{stroke-dasharray:8 3 2 3} .band{fill:var(--c);opacity:.15}
.dot{fill:var(--c)} .bar{stroke:var(--c);stroke-width:1.4;fill:none}
.strip{display:block} .range{fill:var(--c);opacity:.28} .run{fill:var(--c);opacity:.75} .mean{stroke:var(--c);stroke-width:2.5;fill:none}
.published{fill:none;stroke:var(--ink);stroke-width:1.4} .beyond{fill:var(--soft)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1rem;padding:0;margin:.2rem 0 .5rem;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.35rem;max-width:100%} .legend span{overflow-wrap:anywhere} .legend svg{flex:none}
.legend [role=button]{cursor:pointer;border-radius:3px} .legend [aria-pressed=false]{opacity:.35} .gone{display:none}
.key{vertical-align:-1px;margin-right:.35rem}
@media (max-width:600px){body{padding-top:1rem} h1{font-size:1.35rem}
th,td{padding:.35rem .5rem}
th:first-child,td:first-child{min-width:7.5rem;max-width:9rem;white-space:normal} td.long:first-child{min-width:9rem}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--edge:#ccc;--panel:#f4f4f4;--warn:#fff}
body{max-width:none;font-size:10.5pt;padding:0} nav{display:none} .scroll{overflow:visible} table{font-size:8pt}
th:first-child,td:first-child{position:static} figure,tr,svg{break-inside:avoid} h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;height:auto}}
"""

SCRIPT = """
document.querySelectorAll(".legend li").forEach(function(item){
  item.setAttribute("role","button");item.setAttribute("tabindex","0");item.setAttribute("aria-pressed","true");
  item.title="show or hide";
  function toggle(){
    var shown=item.getAttribute("aria-pressed")==="true";
    item.setAttribute("aria-pressed",String(!shown));
    var rows=item.closest("figure").querySelectorAll(".panel [data-row='"+item.dataset.row+"']");
    rows.forEach(function(g){g.classList.toggle("gone",shown);});
  }
  item.addEventListener("click",toggle);
  item.addEventListener("keydown",function(e){if(e.key==="Enter"||e.key===" "){e.preventDefault();toggle();}});
});
"""
