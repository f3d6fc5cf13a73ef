"""How the page of episode_page.py looks, and its search."""

STYLE = """
:root{--back:#f5f6f8;--card:#fff;--line:#dfe2e8;--text:#1b1f27;--dim:#687082;--plot:#f0f2f5;
--x:#d9483b;--y:#2f9e52;--z:#2f74d0;--open:#e08a1e;--sensed:#8d78c8;--end:#e02d2d;--told:#d3a106}
@media (prefers-color-scheme:dark){:root{--back:#14161b;--card:#1e2128;--line:#30343f;
--text:#e8eaee;--dim:#939aa8;--plot:#272b34;--x:#ff7a70;--y:#6ad080;--z:#6ca8ff;--open:#fab254;
--sensed:#a896dc;--end:#ff5c5c;--told:#facc5c}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:14px/1.4 system-ui,sans-serif}
header{display:flex;gap:32px;justify-content:space-between;padding:20px 24px;
background:var(--card);border-bottom:1px solid var(--line)}
h1{margin:0;font-size:21px}
header p{margin:4px 0 12px;color:var(--dim)}
input{width:280px;padding:6px 10px;border:1px solid var(--line);border-radius:7px;font:inherit;
background:var(--back);color:inherit}
#count{margin-left:12px;color:var(--dim)}
.chips{display:flex;flex-wrap:wrap;gap:6px;margin-top:12px}
.chip{padding:3px 10px;border:1px solid var(--line);border-radius:99px;background:none;
color:inherit;font:inherit;font-size:12.5px;cursor:pointer}
.chip b{margin-left:7px;color:var(--dim);font-weight:500}
.chip.on{background:var(--z);border-color:var(--z);color:#fff}.chip.on b{color:#fff}
.side{flex:0 0 300px}
figure{margin:0}
.bars{display:block;width:100%;height:74px;fill:var(--z);opacity:.75}
figcaption{display:flex;justify-content:space-between;color:var(--dim);font-size:12px}
header .legend{display:flex;flex-wrap:wrap;gap:2px 12px;margin:8px 0 0;font-size:12px}
.legend span::before{content:"";display:inline-block;width:10px;height:3px;margin:0 5px 3px 0;
background:var(--c)}
.legend .x{--c:var(--x)}.legend .y{--c:var(--y)}.legend .z{--c:var(--z)}
.legend .target{--c:var(--open)}.legend .sensed{--c:var(--sensed)}
.legend .end{--c:var(--end)}.legend .told{--c:var(--told)}
main{display:grid;gap:16px;padding:20px 24px;
grid-template-columns:repeat(auto-fill,minmax(320px,1fr))}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden;
padding-bottom:8px}
article[hidden]{display:none}
.film{display:flex;gap:1px}.film img{flex:1 1 0;min-width:0;width:0;height:auto;display:block}
.about{display:flex;gap:12px;padding:8px 12px 2px;color:var(--dim)}
.about b{color:var(--text)}
.success{margin-left:auto;color:var(--y)}.failure{margin-left:auto;color:var(--end)}
article p{margin:2px 12px 0;font-weight:500}
article i{color:var(--dim);font-weight:400}
.spark{display:block;width:calc(100% - 24px);height:34px;margin:7px 12px 0;
background:var(--plot);border-radius:4px}
.spark *{fill:none;stroke-width:1.4;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.x{stroke:var(--x)}.y{stroke:var(--y)}.z{stroke:var(--z)}.target{stroke:var(--open)}
.sensed{stroke:var(--sensed)}.zero{stroke:var(--line)}.end{stroke:var(--end)}
.told{stroke:var(--told);stroke-dasharray:3 3}
"""

SCRIPT = """
const cards = [...document.querySelectorAll("article")];
const search = document.getElementById("search");
const chips = [...document.querySelectorAll(".chip")];
function show() {
  const wanted = search.value.toLowerCase().trim();
  let shown = 0;
  for (const card of cards) {
    card.hidden = !card.dataset.search.includes(wanted);
    shown += !card.hidden;
  }
  for (const chip of chips) chip.classList.toggle("on", chip.dataset.text === search.value);
  document.getElementById("count").textContent = `${shown} of ${cards.length} shown`;
}
for (const chip of chips) chip.onclick = () => {
  search.value = search.value === chip.dataset.text ? "" : chip.dataset.text;
  show();
};
search.oninput = show;
search.value = decodeURIComponent(location.hash.slice(1));
show();
"""
