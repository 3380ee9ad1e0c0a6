"""The style sheet of the report: light and dark, wide and narrow, and print. Every text has a contrast of at least 4.5:1."""

STYLE = """
:root{--ink:#1c2230;--soft:#4d5666;--ground:#fff;--panel:#f3f5f9;--line:#ccd2dc;--link:#1a56a0;--bar:#2a6fbb;
 --good:#146c37;--fair:#7a5200;--poor:#a81c14;--none:#4d5666;--tag:#7a1f5c}
@media (prefers-color-scheme:dark){:root{--ink:#e8ebf1;--soft:#b3bccb;--ground:#12151c;--panel:#1c212b;--line:#3b4454;
 --link:#8dbdf7;--bar:#6ea8ec;--good:#6fd08f;--fair:#f0bd55;--poor:#ff978c;--none:#b3bccb;--tag:#7a1f5c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{font:1rem/1.55 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:var(--ink);background:var(--ground);
 max-width:1080px;margin:0 auto;padding:1.4rem 1.1rem 3rem;overflow-wrap:break-word}
.skip{position:absolute;left:-999px}
.skip:focus{position:static;display:inline-block;padding:.4em .7em}
a{color:var(--link)}
h1{font-size:1.8rem;line-height:1.2;margin:.2rem 0 .5rem}
h2{font-size:1.4rem;margin:2.6rem 0 .6rem;padding-bottom:.25rem;border-bottom:2px solid var(--line)}
h3{font-size:1.08rem;margin:1.5rem 0 .35rem}
p,ul{max-width:74ch}
.tag{display:inline-block;background:var(--tag);color:#fff;font-size:.8rem;font-weight:600;
 border-radius:4px;padding:.15em .55em;vertical-align:middle}
.facts{list-style:none;padding:0;margin:0;color:var(--soft);font-size:.95rem}
.note,.missing,figcaption,caption{color:var(--soft)}
.note,figcaption{font-size:.93rem}
.overall{display:inline-block;font-size:1.6rem;line-height:1.2;margin:.6rem 0 0;padding:.45em .8em;border:3px solid;
 border-radius:8px;background:var(--panel)}
.good{color:var(--good)}.fair{color:var(--fair)}.poor{color:var(--poor)}.none{color:var(--none)}
.findings{list-style:none;padding:0;max-width:none}
.findings li{display:grid;grid-template-columns:9.2rem 1fr;gap:.2rem .8rem;padding:.45rem 0;border-top:1px solid var(--line)}
.mark{font-weight:700;white-space:nowrap}
.mark>span{display:inline-block;width:1.2em}
dl{margin:.7rem 0;padding:.6rem .9rem;background:var(--panel);border-radius:6px;font-size:.93rem;
 columns:2 24rem;column-gap:2rem}
dl>div{break-inside:avoid;margin-bottom:.3rem}
dt,dd{display:inline;margin:0}
dfn{font-style:normal;font-weight:700}dt dfn::after{content:": "}
.scroll{overflow-x:auto;margin:.9rem 0}
.scroll:focus-visible,pre:focus-visible,summary:focus-visible{outline:3px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.94rem;min-width:min(100%,34rem)}
caption{text-align:left;font-size:.93rem}
caption span{display:block;position:sticky;left:0;width:max-content;max-width:min(100%,calc(100vw - 2.4rem));
 padding:.2rem 0 .4rem;font-weight:600}
th,td{text-align:left;vertical-align:top;padding:.4rem .7rem;border-bottom:1px solid var(--line)}
thead th{background:var(--panel);vertical-align:bottom}
tbody th{font-weight:500;min-width:7rem;max-width:17rem}
td b{font-weight:650;white-space:nowrap}
td small{display:block;color:var(--soft);font-size:.86rem;white-space:nowrap}
.track{display:block;width:min(40vw,16rem);height:1em;margin-top:.25em;background:var(--panel);border:1px solid var(--line)}
.bar{display:block;height:100%;background:var(--bar)}
img{max-width:100%;height:auto;display:block;background:#fff}
figure{margin:1rem 0}
figcaption{margin:.3rem 0}
.chart{max-width:560px}
.chart img{border:6px solid #fff;border-radius:6px;box-shadow:0 0 0 1px var(--line)}
.chart.wide{max-width:none}
.chart.wide img{max-width:none;width:100%;min-width:760px}
.columns{display:grid;gap:0 1.6rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.group h3{margin-bottom:0}
.strip{margin:.2rem 0 .4rem}
.halves{display:grid;grid-template-columns:1fr 1fr;border:2px solid #fff;box-shadow:0 0 0 1px var(--line)}
.pairs{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr))}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:4px;margin:0;align-content:start}
.pair img{width:100%;image-rendering:auto}
.pair figcaption{grid-column:1/-1}
.pair b{color:var(--poor)}
.box{border:1px solid var(--line);border-radius:8px;padding:.3rem 1rem;background:var(--ground)}
pre{white-space:pre;overflow:auto;background:var(--panel);padding:.7rem;border-radius:6px;max-height:28rem;font-size:.86rem}
code{overflow-wrap:anywhere}
footer{margin-top:3rem;border-top:1px solid var(--line);color:var(--soft)}
@media (max-width:620px){
 h1{font-size:1.5rem}h2{font-size:1.25rem}
 .findings li{grid-template-columns:1fr}
 .track{width:20vw}
 .halves{grid-template-columns:1fr}
 .pairs{grid-template-columns:1fr}
 th,td{padding:.35rem .5rem}
 tbody th{position:sticky;left:0;background:var(--ground);min-width:6rem;max-width:9.5rem}
}
@media print{
 :root{--ink:#000;--soft:#333;--ground:#fff;--panel:#f1f1f1;--line:#999;--link:#000;--bar:#444;
 --good:#146c37;--fair:#7a5200;--poor:#a81c14;--none:#333}
 @page{margin:14mm}
 html{font-size:9.5pt}
 body{max-width:none;padding:0}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 .skip{display:none}
 .scroll{overflow:visible;break-inside:avoid}
 table{font-size:.86rem;width:100%;min-width:0}
 th,td{padding:.25rem .35rem}
 td small,td b{white-space:normal}
 thead{display:table-header-group}
 h2,h3,caption,dl{break-after:avoid}
 tr,figure,.findings li,.group{break-inside:avoid}
 .chart{max-width:8.6cm}
 .columns{grid-template-columns:1fr 1fr}
 details::details-content{content-visibility:visible;height:auto}
 .chart.wide img{min-width:0}
 .strip .halves{grid-template-columns:1fr 1fr}
 .group .columns{grid-template-columns:1fr}
 .pairs{grid-template-columns:repeat(4,1fr)}
 tbody th{position:static;max-width:none;min-width:0}
 pre{white-space:pre-wrap;max-height:none;overflow:visible}
}
"""
