"""The page of report.html: a jinja2 template, always rendered with autoescape."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1c1e21; --soft: #5f656d; --line: #dcdfe3; --paper: #fff; --shade: #f5f6f8; --alert: #fff4e0; }
body { margin: 2rem auto; padding: 0 1.2rem; max-width: 86rem; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.4rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin-top: 1.6rem; }
nav a { margin-right: 1rem; color: #0060a0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { padding: .28rem .7rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.n { text-align: right; }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; height: auto; display: block; border: 1px solid var(--line); background: #fff; }
figcaption { font-size: 13.5px; color: var(--soft); max-width: 46rem; margin-top: .35rem; }
.gallery { display: flex; flex-wrap: wrap; gap: 0 1.6rem; align-items: flex-start; }
ul.alerts { list-style: none; padding: 0; }
ul.alerts li { background: var(--alert); border-left: 4px solid #e69f00; padding: .35rem .7rem; margin: .35rem 0; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 16rem; overflow-y: auto; margin: 0; }
.samples { width: 100%; table-layout: fixed; }
.samples .facts { width: 13rem; color: var(--soft); font-size: 12.5px; }
pre { background: var(--shade); padding: .8rem; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
details { margin: .7rem 0; }
summary { cursor: pointer; font-weight: 600; }
.soft { color: var(--soft); }
.columns { columns: 2 26rem; }
.columns table { width: 100%; }
.columns tr { break-inside: avoid; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if runs|length > 1 %}
<nav>{% for run in runs %}<a href="#run{{ loop.index }}">{{ run.name }}</a>{% endfor %}</nav>
{% endif %}

<h2>Summary</h2>
<div class="wide"><table>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for column in columns %}<td>{{ row[column] if column in row else "–" }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>

<h2>Figures</h2>
<div class="gallery">
{% for name, image, caption, width in images %}
<figure style="max-width: {{ width }}px">
<img src="data:image/png;base64,{{ image }}" width="{{ width }}" alt="{{ name }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% if missing %}
<details><summary>Not drawn: no run has the data ({{ missing|length }})</summary>
<ul class="soft">{% for name, why in missing %}<li>{{ name }}: {{ why }}</li>{% endfor %}</ul></details>
{% endif %}

{% for run in runs %}
<section id="run{{ loop.index }}">
<h2>{{ run.name }}</h2>
<h3>Alerts</h3>
{% if run.alerts %}
<ul class="alerts">{% for alert in run.alerts %}<li>{{ alert.message }}</li>{% endfor %}</ul>
{% else %}
<p class="soft">None.</p>
{% endif %}
{% if run.samples %}
<h3>Samples</h3>
<table class="samples">
<thead><tr><th class="facts">step</th><th>prompt</th><th>response</th></tr></thead>
<tbody>
{% for sample in run.samples %}
<tr><td class="facts">step {{ sample.step }}
{% for column in sample_columns if column in sample.cells %}
{{ "<br>"|safe if loop.first else " · " }}{{ column }}&nbsp;{{ sample.cells[column] }}
{% endfor %}
</td>
<td><div class="text">{{ sample.prompt }}</div></td><td><div class="text">{{ sample.response }}</div></td></tr>
{% endfor %}
</tbody></table>
{% endif %}
<details><summary>Metrics, first and last ({{ run.metrics|length }})</summary>
<div class="columns"><table>
<thead><tr><th>metric</th><th class="n">first</th><th class="n">last</th><th class="n">at step</th></tr></thead>
<tbody>
{% for name, first, last, step in run.metrics %}
<tr><td>{{ name }}</td><td class="n">{{ first }}</td><td class="n">{{ last }}</td><td class="n">{{ step if step else "" }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% if run.recipe %}
<details><summary>Recipe</summary><pre>{{ run.recipe }}</pre></details>
{% endif %}
{% if run.environment %}
<details><summary>Environment</summary><pre>{{ run.environment }}</pre></details>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
