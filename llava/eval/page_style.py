"""The report's style sheet: one column on a phone, light and dark by the reader's own setting."""

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d1d1f; --soft: #62626a; --line: #e2e2e0;
  --accent: #2468c4; --second: #8a8a92; --third: #c9772b; --right: #1c7c3c; --wrong: #b3311f; }
@media (prefers-color-scheme: dark) { :root {
  --page: #161618; --card: #1f1f22; --ink: #ececee; --soft: #a3a3ab; --line: #37373c;
  --accent: #6ea8f2; --second: #8f8f98; --third: #e09a55; --right: #5fc681; --wrong: #f08675; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 44px 0 4px; }
h3 { font-size: 1rem; margin: 24px 0 8px; } h4 { font-size: .9rem; margin: 0 0 6px; font-weight: 600; }
p { margin: 4px 0 14px; max-width: 76ch; } .soft, figcaption, th { color: var(--soft); }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 20px 0; }
.tile, .card, .chart, .bars { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; } .tile b { display: block; font-size: 1.7rem; line-height: 1.25; font-weight: 600; }
.tile span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; margin-top: 16px; } .scroll + p, .barchart + p { margin-top: 16px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 500; } th:first-child, td:first-child { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px; }
.chart { margin: 0; padding: 10px 12px 4px; } 
.chart figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: .88rem; }
.chart code { color: var(--ink); } .chart svg { display: block; width: 100%; height: auto; max-width: 620px; }
.grid { stroke: var(--line); } .border { stroke: var(--second); stroke-dasharray: 2 3; opacity: .7; }
.tick, .stage { font: 12px system-ui, sans-serif; fill: var(--soft); }
.curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.point { fill: transparent; } .point:hover { fill: var(--accent); }
.barchart { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px; }
.bars { padding: 12px 14px; }
.bar { display: grid; grid-template-columns: 8.2rem 1fr 3.9rem; gap: 8px; align-items: center; font-size: .86rem; }
.bar .name { color: var(--soft); } .bar .value { text-align: right; font-variant-numeric: tabular-nums; }
.track { height: 10px; background: var(--line); border-radius: 3px; overflow: hidden; }
.fill { display: block; height: 100%; background: var(--accent); }
.fill.blank { background: var(--second); } .fill.random { background: var(--third); } .fill.before { opacity: .45; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 255px), 1fr)); gap: 12px; }
.card { padding: 12px; display: flex; flex-direction: column; }
.card img { width: 100%; height: 150px; object-fit: contain; background: #f1f1ef; border-radius: 6px;
  margin-bottom: 8px; }
.card dl { margin: 0; font-size: .9rem; display: grid; grid-template-columns: auto 1fr; gap: 0 8px; }
.card dt { color: var(--soft); } .card dd { margin: 0; overflow-wrap: anywhere; }
.verdict { margin-top: auto; padding-top: 6px; font-size: .85rem; font-weight: 600; display: flex; flex-wrap: wrap;
  justify-content: space-between; column-gap: 8px; } .verdict span { white-space: nowrap; }
.verdict .soft { font-weight: 400; } .right { color: var(--right); } .wrong { color: var(--wrong); }
.wordmaps { display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: flex-start; }
.words { margin: 0 0 12px; width: min(100%, var(--full)); } .words .scroll { margin-top: 0; }
.words svg { display: block; border: 1px solid var(--line); border-radius: 6px; }
.words figcaption { font-size: .88rem; margin-bottom: 6px; overflow-wrap: anywhere; }
.words .cell { fill: #fff; fill-opacity: .72; stroke: #00000030; }
.words .word { font: 14px system-ui, sans-serif; fill: #26262a; text-anchor: middle; }
.words .named { fill: #0b4fb3; font-weight: 700; }
footer { margin-top: 48px; color: var(--soft); font-size: .85rem; }
"""
