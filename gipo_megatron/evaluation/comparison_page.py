"""The page of an evaluation's report.html: a jinja2 template, always rendered with autoescape.
Style as in a run's report."""

from gipo_megatron.reports.pages import TEMPLATES

STYLE = (TEMPLATES / "style.css").read_text(encoding="utf-8")

ADDED_STYLE = """
:root { color-scheme: light dark; --win: #0072b2; --tie: #a8adb4; --lose: #d55e00; --link: #0060a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #a0a7b0; --line: #3a3f46; --paper: #16181b; --shade: #202327; --alert: #3a2f17; --link: #6db8ec; }
  :root { --win: #4ba3dc; --tie: #6c737c; --lose: #ec7d3c; }
}
nav a, a { color: var(--link); }
td.n small, p small { color: var(--soft); }
td.n small { display: block; font-size: 11.5px; }
tr.head th { border-bottom: none; }
th.task { text-align: center; border-bottom: 1px solid var(--line); padding-right: .7rem; }
.bar { display: flex; width: 11rem; height: .8rem; margin-top: .3rem; border-radius: 2px; overflow: hidden; }
.bar span { height: 100%; }
.win { background: var(--win); } .tie { background: var(--tie); } .lose { background: var(--lose); }
.key { display: inline-block; width: .7rem; height: .7rem; margin: 0 .3rem 0 .8rem; border-radius: 2px; }
.legend { white-space: nowrap; }
.duel { border: 1px solid var(--line); border-radius: 4px; padding: .7rem .9rem; margin: 1rem 0; }
.duel h4 { margin: 0 0 .5rem; font-size: 13.5px; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.two > div { min-width: 0; }
.two h5 { margin: .3rem 0; font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere; }
.question { background: var(--shade); padding: .5rem .7rem; }
.said { font-size: 13px; color: var(--soft); }
@media (max-width: 50rem) { .two { grid-template-columns: 1fr; } }
@media print { .text { max-height: none; } }
"""

COMPARISON_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
{{ style }}</style>
</head>
<body>
{% macro table(header, rows, first=1) %}
<div class="wide"><table>
<thead><tr>{% for h in header %}<th{% if loop.index > first %} class="n"{% endif %}>{{ h }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td{% if loop.index > first %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<h1>{{ title }}</h1>
<nav><a href="#table">Table</a><a href="#figures">Figures</a><a href="#lengths">Length</a><a href="#policies">Policies</a>
<a href="#parts">Sources and groups</a><a href="#judge">Judge</a><a href="#samples">Samples</a><a href="#made">How it was made</a></nav>

<h2 id="table">Win / tie / lose</h2>
<p class="soft">{{ subject }} against each opponent, in % of the judged prompts, with 95 % intervals below.
{% for name in ("win", "tie", "lose") %}<span class="legend"><span class="key {{ name }}"></span>{{ name }}</span>{% endfor %}</p>
<div class="wide"><table>
<thead><tr><th>task</th><th>opponent</th><th></th><th class="n">win</th><th class="n">tie</th><th class="n">lose</th>
<th class="n">judged</th><th class="n">failed</th><th class="n">flipped</th><th class="n">sign test p</th></tr></thead>
<tbody>
{% for row in main %}
<tr><td>{{ row.task }}</td><td>{{ row.opponent }}</td>
<td>{% if row.n %}<div class="bar" role="img" aria-label="{{ row.bar }}">
{% for name, width in row.widths %}<span class="{{ name }}" style="width: {{ width }}%"></span>{% endfor %}</div>{% endif %}</td>
{% for share, interval in row.shares %}<td class="n">{{ share }}<small>{{ interval }}</small></td>{% endfor %}
<td class="n">{{ row.n }}</td><td class="n">{{ row.failed }}</td><td class="n">{{ row.flipped }}</td><td class="n">{{ row.p }}</td></tr>
{% endfor %}
</tbody></table></div>
<ul class="soft">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>

<h2 id="figures">Figures</h2>
{% if not images %}<p class="soft">None was drawn.</p>{% endif %}
<div class="gallery">
{% for image in images %}
<figure><img src="data:{{ image.kind }};base64,{{ image.data }}"{% if image.width %} width="{{ image.width }}"{% endif %}
 alt="{{ image.name }}"><figcaption>{{ image.caption }}</figcaption></figure>
{% endfor %}
</div>

<h2 id="lengths">Length-controlled</h2>
<p class="soft">Preference is (wins + ties / 2) / judged.
The controlled rate is what a logistic regression expects were both answers equally long.</p>
{{ table(["task", "opponent", "note", "preference %", "length-controlled %"], lengths, 3) }}

<h2 id="policies">Policies</h2>
{{ table(policy_header, policies, 2) }}

<h2 id="parts">Sources and groups</h2>
{% for title, rows in parts %}
<h3>{{ title }}</h3>
{% if rows %}{{ table(["task", "opponent", title, "win %", "tie %", "lose %", "judged", "failed", "flipped", "sign test p"], rows, 3) }}
{% else %}<p class="soft">None was given.</p>{% endif %}
{% endfor %}

{% for audit in audits %}
{{ audit }}
{% endfor %}

<h2 id="judge">Judge: failures and flips</h2>
{{ table(["task", "opponent", "flips to the first", "flips to the second", "flip rate %", "failed prompts", "of"], flips, 2) }}
{% if failures %}
<h3>Why it failed</h3>
{{ table(["the judge said", "presentations"], failures) }}
{% endif %}

<h2 id="samples">Samples</h2>
<p class="soft">Up to {{ per_outcome }} prompts of each outcome and pair,
by the order of their ids, which are hashes: nobody chose them.</p>
{% for pair, shown in samples %}
<details{% if loop.first %} open{% endif %}><summary>{{ pair }}</summary>
{% for duel in shown %}
<article class="duel">
<h4>{{ duel.title }}</h4>
<div class="text question">{{ duel.question }}</div>
<div class="two">
<div><h5>{{ duel.left }}</h5><div class="text">{{ duel.left_text }}</div></div>
<div><h5>{{ duel.right }}</h5><div class="text">{{ duel.right_text }}</div></div>
</div>
<details><summary>{{ duel.verdicts }}</summary>
<div class="two said">{% for said in duel.said %}<div class="text">{{ said }}</div>{% endfor %}</div></details>
</article>
{% endfor %}
</details>
{% endfor %}

<h2 id="made">How each number was made</h2>
<ul>{% for line in made %}<li>{{ line }}</li>{% endfor %}</ul>
<h3>Judge</h3>
<pre>{{ judge }}</pre>
{% for name, text in files %}
<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
</body>
</html>
"""
