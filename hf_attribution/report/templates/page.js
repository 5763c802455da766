// What comes from datasets reaches the page through text nodes alone: nothing of it is ever parsed as HTML.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const $ = (id) => document.getElementById(id);
  const queries = page.queries.map((item, row) => ({ ...item, row }));
  const spelled = new WeakMap(); // what is searched of an item, from the first search on
  let current = 0; // the query that is shown
  let listed = []; // the queries that pass the filters, in their order
  const drawn = {}; // charts by their element

  const idle = () => new Promise((done) => {
    if (window.requestIdleCallback) requestIdleCallback(done, { timeout: 1000 });
    else setTimeout(done);
  });

  function element(name, properties = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "class") made.className = value;
      else if (key in made) made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function words(item) {
    if (!spelled.has(item)) {
      const texts = item.fields.map((field) => field.text ?? field.pieces?.join("") ?? field.note ?? "");
      spelled.set(item, [item.group ?? "", ...texts].join("\n").normalize("NFKC").toLowerCase());
    }
    return spelled.get(item);
  }

  function matches(item, row, search) {
    const wanted = search.trim().normalize("NFKC").toLowerCase();
    return !wanted || words(item).includes(wanted) || String(row) === wanted || `row ${row}` === wanted;
  }

  function number(value, digits = 3) {
    if (value == null) return "–";
    return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(digits);
  }
  const correlation = (value) => (value == null ? "–" : value.toFixed(2).replace("-", "−"));
  const signed = (value) => (value > 0 ? "+" : "") + number(value).replace("-", "−");
  function plural(count, noun) {
    const many = noun.endsWith("y") ? `${noun.slice(0, -1)}ies` : `${noun}s`;
    return `${count.toLocaleString("en")} ${count === 1 ? noun : many}`;
  }

  // ---- the content of a row

  function content(item, columns, colours) {
    const box = element("div", { class: "content" });
    item.fields.forEach((field, place) => {
      if (item.fields.length > 1 && item.fields.length === columns.length) {
        box.append(element("span", { class: "column", dir: "auto" }, columns[place]));
      }
      if (field.image) {
        const name = item.group === undefined ? "an example" : `an example of ${item.group}`;
        const small = Math.max(field.width, field.height) <= 64;
        box.append(element("img", { src: field.image, alt: `Image: ${name}`, class: small ? "tiny" : "photo",
          width: field.width, height: field.height, loading: "lazy", decoding: "async" }));
      } else if (field.note) {
        box.append(element("p", { class: "note" }, field.note));
      } else {
        box.append(...text(field, colours));
      }
    });
    if (colours && colours.rest) {
      box.append(element("p", { class: "note" }, `${signed(colours.rest)} belongs to no token (norms, the head).`));
    }
    return box;
  }

  function text(field, colours) {
    const shown = element("p", { class: "text", dir: "auto" });
    if (field.pieces) shown.append(...coloured(field, colours));
    else shown.append(field.text);
    const parts = [shown];
    const length = shown.textContent.length;
    if (length > 420 || shown.textContent.split("\n").length > 6) {
      shown.classList.add("clamped");
      const more = element("button", { type: "button", class: "more", "aria-expanded": "false" }, "Show all");
      more.addEventListener("click", () => {
        const open = shown.classList.toggle("clamped");
        more.setAttribute("aria-expanded", String(!open));
        more.textContent = open ? "Show all" : "Show less";
      });
      parts.push(more);
    }
    if (field.cut) {
      const whole = `Cut: the first ${length.toLocaleString("en")} of ${plural(field.cut, "character")}.`;
      parts.push(element("p", { class: "note" }, whole));
    } else if (field.cut_tokens) {
      parts.push(element("p", { class: "note" }, `Cut: it has ${plural(field.cut_tokens, "token")}.`));
    }
    return parts;
  }

  function coloured(field, colours) {
    if (!colours) return [field.pieces.join("")];
    const levels = Int8Array.from(atob(colours.values), (character) => character.charCodeAt(0));
    return field.pieces.map((piece, place) => {
      const level = levels[field.tokens[place]] ?? 0;
      if (!level) return piece;
      const span = element("span", { class: `token ${level > 0 ? "pos" : "neg"}` }, piece);
      span.title = signed((level / 127) * colours.scale);
      span.style.setProperty("--level", `${Math.round(8 + Math.abs(level) / 127 * 62)}%`);
      return span;
    });
  }

  function group(item, query) {
    if (item.group === undefined) return [];
    const chip = element("span", { class: "chip", dir: "auto" }, item.group);
    if (!query || query.group === undefined) return [chip];
    const same = item.group === query.group;
    const said = element("span", { class: `chip ${same ? "same" : "other"}` }, same ? "same" : "other");
    said.title = `${same ? "The same" : "Another"} ${page.group_column} as the query`;
    return [chip, said];
  }

  // ---- the list of queries

  function fillList() {
    const search = $("query-search").value;
    const only = $("query-group").value;
    listed = queries.filter((query) => matches(query, query.row, search) && (!only || query.group === only));
    const order = $("query-order").value;
    if (order !== "row") {
      const sign = order === "best" ? -1 : 1;
      const lds = (query) => page.truth.lds[query.row] ?? (order === "best" ? -Infinity : Infinity);
      listed.sort((a, b) => sign * (lds(a) - lds(b)) || a.row - b.row);
    }
    $("query-list").replaceChildren(...listed.map(option));
    $("query-count").textContent = listed.length === queries.length
      ? plural(queries.length, "query")
      : `${listed.length} of ${queries.length} queries`;
    mark();
  }

  function option(query) {
    const line = element("span", { class: "line" }, element("b", {}, String(query.row)), ...group(query));
    if (page.truth) line.append(element("span", { class: "quiet lds" }, `LDS ${correlation(page.truth.lds[query.row])}`));
    const image = query.fields.find((field) => field.image);
    const made = element("li", { role: "option", id: `option-${query.row}` }, line);
    if (image) {
      const tiny = Math.max(image.width, image.height) <= 64 ? "tiny" : "photo";
      made.append(element("img", { src: image.image, alt: "", class: `thumb ${tiny}`, loading: "lazy" }));
    }
    const first = query.fields.find((field) => field.text);
    if (first) made.append(element("span", { class: "beginning", dir: "auto" }, first.text.slice(0, 160)));
    made.addEventListener("click", () => show(query.row, true));
    return made;
  }

  function mark() {
    for (const made of $("query-list").children) {
      const chosen = made.id === `option-${current}`;
      made.setAttribute("aria-selected", String(chosen));
      if (chosen) reveal(made);
    }
    if ($(`option-${current}`)) $("query-list").setAttribute("aria-activedescendant", `option-${current}`);
    else $("query-list").removeAttribute("aria-activedescendant");
    const place = listed.findIndex((query) => query.row === current);
    $("previous").disabled = place <= 0 && listed.length > 0 && place !== -1;
    $("next").disabled = !listed.length || place === listed.length - 1;
  }

  function reveal(made) { // without moving the page, as scrollIntoView would
    const box = $("query-list");
    const top = made.offsetTop - box.offsetTop;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + made.offsetHeight > box.scrollTop + box.clientHeight) {
      box.scrollTop = top + made.offsetHeight - box.clientHeight;
    }
  }

  function move(step) {
    const place = listed.findIndex((query) => query.row === current);
    const next = place === -1 ? (step > 0 ? 0 : listed.length - 1) : place + step;
    if (listed.length) show(listed[Math.min(Math.max(next, 0), listed.length - 1)].row);
  }

  $("query-list").addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const step = steps[event.key];
    if (Number.isFinite(step)) move(step);
    else if (listed.length) show(listed[step < 0 ? 0 : listed.length - 1].row);
  });

  // ---- one query

  function show(row, clicked = false) {
    current = row;
    const query = queries[row];
    $("query-heading").textContent = `Query ${row}`;
    const said = page.truth ? `, LDS ${correlation(page.truth.lds[row])}` : "";
    $("query-status").textContent = `Query ${row} is shown${query.group === undefined ? "" : `, ${query.group}`}${said}`;
    const line = element("p", { class: "line" }, ...group(query));
    if (page.truth) line.append(element("span", { class: "quiet" }, `LDS ${correlation(page.truth.lds[row])}`));
    $("query-content").replaceChildren(line, content(query, page.columns.query));
    fillEnds();
    mark();
    fillScatter();
    history.replaceState(null, "", `#query=${row}`);
    // On a phone the list stands above what it chooses.
    if (clicked && matchMedia("(max-width: 52rem)").matches) $("query-heading").scrollIntoView({ block: "start" });
  }

  function fillEnds() {
    const query = queries[current];
    const search = $("example-search").value;
    const only = $("example-group").value;
    const largest = Math.max(...[...query.helpful, ...query.harmful].map(([, score]) => Math.abs(score)), 1e-30);
    for (const end of ["helpful", "harmful"]) {
      const kept = query[end].map(([row, score], place) => ({ row, score, rank: place + 1 })).filter(({ row }) => {
        const same = page.examples[row].group === query.group;
        return matches(page.examples[row], row, search) && (!only || same === (only === "same"));
      });
      $(end).replaceChildren(...kept.map((each) => example(each, query, largest)));
      $(end).classList.toggle("pictures", query[end].every(([row]) => isPicture(page.examples[row])));
      const all = query[end].length;
      let said = kept.length === all ? plural(all, "example") : `${kept.length} of ${plural(all, "example")}`;
      if (query.group !== undefined && page.examples[query[end][0][0]].group !== undefined) {
        const same = query[end].filter(([row]) => page.examples[row].group === query.group).length;
        said += `, ${same} of ${all} with the query's ${page.group_column}`;
      }
      $(`${end}-count`).textContent = said;
    }
  }

  // Small pictures alone stand side by side.
  const isPicture = ({ fields: [field, ...more] }) =>
    !more.length && field.image !== undefined && Math.max(field.width, field.height) <= 64;

  function example({ row, score, rank }, query, largest) {
    const item = page.examples[row];
    const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("i"));
    bar.firstChild.style.width = `${Math.abs(score) / largest * 100}%`;
    const line = element("p", { class: "line" }, element("span", { class: "rank" }, `${rank}.`),
      element("b", { class: score > 0 ? "pos" : "neg" }, signed(score)), bar,
      element("span", { class: "quiet" }, `row ${row}`), ...group(item, query));
    return element("li", { value: rank }, line, content(item, page.columns.train, query.colours?.[row]));
  }

  // ---- rankings over all queries

  function fillRanking() {
    const ranking = page.rankings[$("ranking").value];
    const kept = ranking.rows.map(([row, value], place) => ({ row, value, rank: place + 1 }))
      .filter(({ row }) => matches(page.examples[row], row, $("ranking-search").value));
    $("ranking-note").textContent = ranking.note;
    $("ranking-count").textContent = kept.length === ranking.rows.length
      ? `The first ${plural(kept.length, "example")}`
      : `${kept.length} of the first ${plural(ranking.rows.length, "example")}`;
    $("ranking-list").replaceChildren(...kept.map(({ row, value, rank }) => {
      const seen = queries.filter((query) => [...query.helpful, ...query.harmful].some(([other]) => other === row));
      const line = element("p", { class: "line" }, element("span", { class: "rank" }, `${rank}.`),
        element("b", {}, signed(value)), element("span", { class: "quiet" }, `row ${row}`), ...group(page.examples[row]));
      if (seen.length) {
        const first = element("button", { type: "button", class: "more" }, `query ${seen[0].row}`);
        first.addEventListener("click", () => { show(seen[0].row); $("query-heading").focus(); });
        line.append(element("span", { class: "quiet" }, `at an end of ${plural(seen.length, "query")}: `, first));
      }
      return element("li", { value: rank }, line, content(page.examples[row], page.columns.train));
    }));
  }

  // ---- charts

  // The scripts that draw are most of the page: they are read once the query is there.
  function loadVega() {
    const script = document.createElement("script");
    script.textContent = $("vega").textContent;
    document.head.append(script);
  }

  function points() {
    const { predicted, true: outputs } = page.truth;
    return predicted[current].map((value, subset) => ({ subset, predicted: value, true: outputs[current][subset] }));
  }

  function config() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const font = getComputedStyle(document.body).fontFamily;
    const axis = { labelColor: colour("--ink"), titleColor: colour("--ink"), gridColor: colour("--line"),
      domainColor: colour("--line"), tickColor: colour("--line"), labelFont: font, titleFont: font,
      titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 13 };
    return { background: "transparent", axis, view: { stroke: null }, point: { color: colour("--help") },
      rule: { color: colour("--help") }, text: { color: colour("--ink"), font, fontSize: 12 } };
  }

  async function draw(id, chart) {
    const box = $(id);
    if (!box || !chart) return;
    drawn[id]?.finalize();
    drawn[id] = await window.vegaEmbed(box, { ...chart, config: config() },
      { actions: false, renderer: "svg", ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true } });
  }

  async function fillScatter() {
    if (!page.truth) return;
    const lds = page.truth.lds[current];
    $("scatter-caption").textContent = `Predicted against true output of query ${current}, a point a subset: ` +
      (lds == null ? "its rank correlation is not defined." : `rank correlation (LDS) ${correlation(lds)}.`);
    if ($("scatter-details").open) tabulate();
    if (drawn.scatter) await drawn.scatter.view.data("points", points()).runAsync();
  }

  function tabulate() {
    const head = element("tr", {}, ...["subset", "predicted", "true"].map((name) =>
      element("th", { scope: "col", class: "number" }, name)));
    const rows = points().map((point) => element("tr", {}, ...Object.values(point).map((value) =>
      element("td", { class: "number" }, number(value, 4)))));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    $("scatter-details").querySelector("div").replaceChildren(table);
  }

  async function drawAll() {
    if (!window.vegaEmbed) return;
    await draw("scatter", { ...page.charts.scatter, data: { name: "points", values: points() } });
    await fillScatter(); // another query may have been chosen meanwhile
    await idle();
    await draw("cost", page.charts.cost);
  }

  // ---- start

  const groups = [...new Set(queries.map((query) => query.group).filter((name) => name !== undefined))];
  groups.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
  $("query-group").append(...groups.slice(0, 500).map((name) => element("option", { value: name }, name)));
  $("query-group-label").hidden = groups.length < 2;
  $("example-group-label").hidden = !groups.length;
  if (page.truth) {
    $("query-order").append(element("option", { value: "best" }, "highest LDS first"),
      element("option", { value: "worst" }, "lowest LDS first"));
  }
  $("ranking").append(...page.rankings.map(({ title }, place) => element("option", { value: place }, title)));
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["query-search", "query-group", "query-order"]) $(id).addEventListener("input", fillList);
  for (const id of ["example-search", "example-group"]) $(id).addEventListener("input", fillEnds);
  for (const id of ["ranking", "ranking-search"]) $(id).addEventListener("input", fillRanking);
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  $("scatter-details")?.addEventListener("toggle", () => $("scatter-details").open && tabulate());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  const asked = () => Number(/^#query=(\d+)$/.exec(location.hash)?.[1] ?? NaN);
  window.addEventListener("hashchange", () => queries[asked()] && show(asked()));
  async function start() { // the query first, and what is below or slow when there is time
    current = queries[asked()] ? asked() : 0;
    fillList();
    show(current);
    await idle();
    fillRanking();
    if (!page.charts) return;
    await idle();
    loadVega();
    await drawAll();
  }
  start();
})();
