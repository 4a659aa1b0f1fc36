"""HTML and CSS around the report's sections, for light and dark displays; `tarflow.evaluation.report.build` fills it."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title} – TarFlow</title>
<style>
:root {{
  color-scheme: light dark;
  --page: #ffffff; --text: #1b1f24; --soft: #5d6672; --line: #dfe3e8; --panel: #f6f7f9; --warn: #9a5b00;
}}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #14171b; --text: #e6e8eb; --soft: #9aa4b0; --line: #2e343c; --panel: #1c2026; --warn: #f0b35a; }}
}}
body {{ margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ font-size: 26px; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 40px 0 10px; border-bottom: 1px solid var(--line); padding-bottom: 6px; }}
p {{ color: var(--soft); max-width: 75ch; margin: 6px 0 12px; }}
p.warning {{ color: var(--warn); }}
code {{ font-family: ui-monospace, monospace; }}
.cards {{ display: flex; flex-wrap: wrap; gap: 12px; margin-top: 22px; }}
.card {{ background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; min-width: 130px; }}
.label, .note {{ color: var(--soft); font-size: 12.5px; }}
.value {{ font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.row {{ display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }}
figure {{ margin: 0; }}
figure.plot {{ display: inline-block; width: 370px; max-width: 100%; margin: 0 14px 14px 0; }}
figure.plot svg {{ width: 100%; height: auto; font-family: inherit; }}
.row > figure {{ flex: 0 1 360px; min-width: 220px; }}
.pair > figure {{ flex: 0 1 570px; min-width: 280px; }}
img {{ max-width: 100%; height: auto; border-radius: 4px; }}
figcaption {{ color: var(--soft); font-size: 13px; margin-top: 4px; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 10px; }}
.tiles img {{ width: 84px; image-rendering: pixelated; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }}
th {{ color: var(--soft); font-weight: 500; }}
td:first-child {{ white-space: nowrap; font-family: ui-monospace, monospace; font-size: 12.5px; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}, as of {made}.</p>
{body}
</body>
</html>
"""
