"use strict";
(() => {
  const PAGE = 20;      // samples on a page
  const SMALL = 128;    // pixels of a width below which an image is shown with hard edges
  const SAME = 1e-6;    // scores that differ by less are equal
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);

  // Texts of the data become text nodes and attribute values, never markup.
  function make(tag, attributes, ...children) {
    const svg = ["svg", "rect", "text"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // --- theme

  const theme = find("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : dark.matches;
  }

  function nameTheme() {
    theme.textContent = isDark() ? "☀ Light" : "☾ Dark";
    theme.setAttribute("aria-label", isDark() ? "Light theme" : "Dark theme");
  }

  // A browser may forbid a page to keep anything.
  function kept(action) {
    try {
      return action(localStorage);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      return null;
    }
  }

  const chosen = kept((storage) => storage.getItem("r3jax-theme"));
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  theme.hidden = false;
  nameTheme();
  dark.addEventListener("change", nameTheme);
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    kept((storage) => storage.setItem("r3jax-theme", document.documentElement.dataset.theme));
    nameTheme();
  });

  function tableOf(caption, head, rows) {
    return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
      make("table", {}, make("caption", { class: "hidden" }, caption),
        make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
  }

  // --- charts: what the curves say under the pointer, and as a table

  const short = (value) => value === null ? "missing" : String(Number(value.toPrecision(4)));

  function reading([, y, low, high]) {
    return low === null || high === null ? short(y) : `${short(y)} [${short(low)}, ${short(high)}]`;
  }

  function nearest(points, x) {
    return points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
  }

  document.querySelectorAll(".chart").forEach((figure, number) => {
    const { x_label: xLabel, reach: [first, last], series } = data.charts[number];
    const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
    const said = figure.querySelector(".reading"), rest = [...said.childNodes];
    const legend = [...figure.querySelectorAll(".legend strong")], ends = legend.map((value) => value.textContent);
    const left = Number(svg.dataset.left), right = Number(svg.dataset.right);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const at = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
      const aim = first + (at - left) / (right - left) * (last - first);
      const points = series.map(({ points }) => nearest(points, aim));
      const x = points.reduce((best, point) => nearest([best, point], aim))[0];
      const place = last > first ? left + (x - first) / (last - first) * (right - left) : (left + right) / 2;
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.setAttribute("visibility", "visible");
      legend.forEach((value, index) => { value.textContent = short(points[index][1]); });
      const value = legend.length ? [] : [": ", make("strong", {}, reading(points[0]))];
      said.replaceChildren(`${xLabel} ${short(x)}`, ...value);
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      said.replaceChildren(...rest);
      legend.forEach((value, index) => { value.textContent = ends[index]; });
    });
    const numbers = make("details", {}, make("summary", {}, "Numbers"));
    numbers.addEventListener("toggle", () => {
      if (numbers.childElementCount > 1) return;
      const places = [...new Set(series.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
      const values = series.map(({ points }) => new Map(points.map((point) => [point[0], reading(point)])));
      const head = [xLabel, ...series.map(({ label }) => label)].map((name) => make("th", { scope: "col" }, name));
      const rows = places.map((x) => make("tr", {}, make("th", { scope: "row" }, short(x)),
        ...values.map((of) => make("td", {}, of.get(x) ?? ""))));
      numbers.append(tableOf(figure.querySelector("h3").textContent, head, rows));
    });
    figure.append(numbers);
  });

  // --- samples: what is known of them

  const samples = data.samples;
  if (!samples.length) return;
  const severalSteps = new Set(samples.map(({ step }) => step)).size > 1;
  const numberOf = new Map(samples.map(({ key }, number) => [key, number]).reverse());
  let texts = null;  // made at the first search

  const label = (turn, number) => turn.label || (number ? `round ${number + 1}` : "draft");
  const isRight = (score) => score !== null && score >= 1 - SAME;
  const known = (value) => value !== null && value !== undefined;
  const scoreOf = (turn) => turn.score ?? null;

  function change(before, after) {
    if (!known(before) || !known(after)) return null;
    return Math.abs(after - before) < SAME ? 0 : after - before;
  }

  const SIGNS = { 1: ["▲", "better"], "-1": ["▼", "worse"], 0: ["=", "same"] };

  function inWords(difference) {
    const [sign, word] = SIGNS[Math.sign(difference)];
    const amount = difference ? `${difference > 0 ? "+" : "−"}${Math.abs(difference).toFixed(2)} ` : "";
    const symbol = make("span", { "aria-hidden": "true" }, sign);
    return make("span", { class: `change ${word}` }, symbol, ` ${amount}${word}`);
  }

  // --- which samples are shown

  const form = find("filters");
  const FIELDS = ["q", "tag", "step", "turn", "outcome", "min", "max", "sort"].filter((name) => form.elements[name]);
  const wanted = Object.fromEntries([...FIELDS, "step"].map((name) => [name, ""]));  // as the form says
  const words = () => wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = [];        // numbers of samples
  let page = 0;
  let current = null;    // number of the sample that the reader is at
  let boxes = false;
  let viewed = null;     // turn of the large view

  function judged(sample) {
    return wanted.turn === "" ? sample.turns.length - 1 : Number(wanted.turn) - 1;
  }

  function gain(sample) {
    const turn = judged(sample);
    return turn > 0 ? change(sample.turns[0].score, sample.turns[turn].score) : null;
  }

  const OUTCOMES = {
    right: (sample, score) => isRight(score),
    wrong: (sample, score) => score !== null && !isRight(score),
    improved: (sample) => gain(sample) > 0,
    worse: (sample) => gain(sample) < 0,
    unchanged: (sample) => gain(sample) === 0,
    finished: (sample) => sample.turns[judged(sample)].stop === true,
    missing: (sample, score) => score === null,
  };

  function searchable(sample) {
    const parts = sample.turns.flatMap(({ text, instruction }) => [text, instruction]);
    return [sample.prompt, ...parts].join("\n").toLowerCase();
  }

  // Missing values come last in either direction.
  function by(value, sign) {
    return (a, b) => {
      const x = value(samples[a]), y = value(samples[b]);
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return sign * (x - y) || a - b;
    };
  }

  const finalScore = (sample) => scoreOf(sample.turns[judged(sample)]);
  const ORDERS = {
    "": (a, b) => samples[b].step - samples[a].step || a - b,
    oldest: (a, b) => samples[a].step - samples[b].step || a - b,
    lowest: by(finalScore, 1), highest: by(finalScore, -1), gain: by(gain, -1), loss: by(gain, 1),
  };

  function select() {
    for (const name of FIELDS) wanted[name] = form.elements[name].value;
    const terms = words(), outcome = OUTCOMES[wanted.outcome];
    const low = wanted.min === "" ? null : Number(wanted.min), high = wanted.max === "" ? null : Number(wanted.max);
    if (terms.length && !texts) texts = samples.map(searchable);
    const fits = (sample, number) => {
      if (judged(sample) >= sample.turns.length || judged(sample) < 0) return false;
      if (wanted.tag !== "" && sample.tag !== wanted.tag) return false;
      if (wanted.step !== "" && String(sample.step) !== wanted.step) return false;
      const score = finalScore(sample);
      if ((low !== null || high !== null) && score === null) return false;
      if (low !== null && score < low - SAME || high !== null && score > high + SAME) return false;
      if (outcome && !outcome(sample, score)) return false;
      return terms.every((term) => texts[number].includes(term));
    };
    shown = samples.flatMap((sample, number) => fits(sample, number) ? [number] : []).sort(ORDERS[wanted.sort]);
  }

  // --- the address

  function address(more) {
    const values = FIELDS.filter((name) => wanted[name] !== "").map((name) => [name, wanted[name]]);
    if (boxes) values.push(["boxes", "1"]);
    return `#${new URLSearchParams([...values, ...Object.entries(more)])}`;
  }

  function remember() {
    const more = current !== null ? { sample: samples[current].key } : page ? { page: page + 1 } : {};
    if (viewed !== null) more.view = viewed + 1;
    const hash = address(more);
    const whole = hash === "#" ? location.pathname + location.search : hash;
    if (hash !== location.hash) history.replaceState(null, "", whole);
  }

  function restore({ type }) {
    // A link to a section keeps the filters; a page that is opened there has none.
    const isSection = /^#(gallery|headline|curves|numbers|evaluations|run)$/.test(location.hash);
    if (isSection && type === "hashchange") return;
    const values = new URLSearchParams(isSection ? "" : location.hash.slice(1));
    history.scrollRestoration = values.has("sample") ? "manual" : "auto";
    for (const name of FIELDS) {
      const field = form.elements[name];
      const value = values.get(name) ?? "";
      field.value = field.type === "number" && !Number.isFinite(Number(value)) ? "" : value;
      if (field.selectedIndex === -1) field.value = "";
    }
    setBoxes(values.get("boxes") === "1");
    select();
    const key = values.get("sample");
    current = numberOf.get(key) ?? null;
    const place = shown.indexOf(current);
    if (current !== null && place < 0) current = null;
    page = current !== null ? Math.floor(place / PAGE) : Math.max(Number(values.get("page")) - 1 || 0, 0);
    render();
    if (key !== null && current === null) {
      say(`. The sample ${key} is ${numberOf.has(key) ? "hidden by the filters" : "not here"}`);
    }
    if (current !== null) reach(current);
    const turn = Number(values.get("view")) - 1;
    if (current !== null && samples[current].turns[turn]) openView(turn); else view.close();
  }

  // --- cards

  function picture(sample, turn, number) {
    const score = known(turn.score) ? `, score ${turn.score.toFixed(2)}` : "";
    const alt = `${label(turn, number)} of: ${sample.prompt}${score}`;
    const image = make("img", { src: turn.image, loading: "lazy", decoding: "async", alt });
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < SMALL));
    return make("span", { class: "picture" }, image, turn.boxes?.length ? overlay(turn.boxes) : null);
  }

  const percent = (share) => `${(100 * share).toFixed(3)}%`;

  function overlay(found) {
    const drawn = found.flatMap(({ label: name, box: [top, left, bottom, right] }) => {
      const place = { x: percent(left), y: percent(top), width: percent(right - left), height: percent(bottom - top) };
      const middle = Math.min(Math.max((left + right) / 2, .12), .88), dy = top < .07 ? "1em" : "-.3em";
      return [make("rect", { class: "halo", ...place }), make("rect", place),
        make("text", { "text-anchor": "middle", x: percent(middle), y: percent(top), dy }, name)];
    });
    const said = `The verifier saw: ${found.map(({ label: name }) => name).join(", ")}`;
    return make("svg", { class: "boxes", role: "img", "aria-label": said }, ...drawn);
  }

  function scoreLine(sample, number) {
    const turn = sample.turns[number], score = scoreOf(turn);
    const moved = number ? change(sample.turns[number - 1].score, score) : null;
    const value = score === null ? make("span", { class: "quiet" }, "score missing")
      : make("span", { class: isRight(score) ? "score right" : "score" }, `score ${score.toFixed(2)}`,
        isRight(score) ? " ✓" : null);
    return make("p", { class: "scores" }, value, moved === null ? null : inWords(moved));
  }

  function parts(turn) {
    const values = Object.entries(turn.parts ?? {});
    if (known(turn.format)) values.push(["format", turn.format]);
    const rows = values.map(([name, value]) => make("div", {}, make("dt", {}, name),
      make("dd", {}, value === null ? "missing" : String(Number(value.toFixed(2))))));
    if (known(turn.tokens)) rows.push(make("div", {}, make("dt", {}, "tokens"), make("dd", {}, String(turn.tokens))));
    return rows.length ? make("dl", { class: "parts" }, ...rows) : null;
  }

  function saying(name, text) {
    if (!text) return null;
    return make("div", { class: `said ${name}` }, make("h4", {}, name), make("p", {}, text));
  }

  // What the model wrote is a thought between tags, and a rest; an instruction is that rest, and is said once.
  function spoken(turn) {
    const [, thought, rest] = /^\s*\x3cthink>([^]*?)\x3c\/think>([^]*)$/.exec(turn.text) ?? [null, null, turn.text];
    const said = turn.stop ? turn.instruction || rest : turn.instruction;
    const more = rest.trim() === said.trim() ? null : saying(thought === null ? "text" : "answer", rest.trim());
    return [thought === null ? null : saying("thought", thought.trim()), more];
  }

  function facts(sample, number) {
    const turn = sample.turns[number];
    const asked = turn.stop ? make("p", { class: "finished" }, "finished: no further edit")
      : saying("instruction", turn.instruction);
    const reason = turn.reason ? make("p", { class: "reason" }, turn.reason) : null;
    return make("div", { class: "facts" }, scoreLine(sample, number), reason, parts(turn), ...spoken(turn), asked);
  }

  const isRepeated = ({ turns }, index) => index > 0 && turns[index].image === turns[index - 1].image;
  // Of the turns behind a stop, which repeat it, the first is shown.
  const isShown = (sample, index) => !(isRepeated(sample, index) && sample.turns[index].stop &&
    sample.turns[index - 1].stop);

  function turnOf(sample, number, index) {
    const name = label(sample.turns[index], index);
    const said = `Large view of ${name}: ${sample.prompt}`;
    const open = make("button", { type: "button", class: "open", "aria-label": said },
      picture(sample, sample.turns[index], index));
    open.addEventListener("click", () => {
      become(number);
      openView(index);
    });
    const repeated = isRepeated(sample, index);
    const shown = repeated ? make("p", { class: "repeated quiet" }, "the same image") : open;
    return make("li", { class: repeated ? "folded" : null }, make("h4", { class: "turn" }, name), shown,
      facts(sample, index));
  }

  const plain = (answer) => String(answer).trim().toLowerCase().replace(/\.$/, "");
  const agrees = ({ expected, answer }) => plain(expected) === plain(answer);

  function answersOf(answers) {
    const right = answers.filter(agrees).length;
    const heads = ["kind", "question", "expected", "answered", ""].map((name) =>
      make("th", { scope: "col" }, name || make("span", { class: "hidden" }, "verdict")));
    const rows = answers.map((answer) => make("tr", {}, make("td", {}, answer.kind),
      make("th", { scope: "row" }, answer.question), make("td", {}, answer.expected), make("td", {}, answer.answer),
      make("td", { class: agrees(answer) ? "better" : "worse" }, agrees(answer) ? "✓ right" : "✗ wrong")));
    return make("details", { class: "answers" },
      make("summary", {}, `Questions about the first image: ${right} of ${answers.length} right`),
      tableOf("Questions about the first image", heads, rows));
  }

  function outcomeOf(sample) {
    const last = sample.turns.at(-1), score = scoreOf(last);
    const total = sample.turns.length > 1 ? change(sample.turns[0].score, score) : null;
    const judgement = isRight(score) ? ["right", "✓ right"] : ["wrong", "✗ wrong"];
    const verdict = score === null ? ["quiet", "no score"] : judgement;
    return make("span", { class: "outcome" }, make("span", { class: `verdict ${verdict[0]}` }, verdict[1]),
      total === null ? null : inWords(total));
  }

  function card(number) {
    const sample = samples[number], id = `sample-${number}`;
    const link = make("a", { class: "link", href: address({ sample: sample.key }),
      "aria-label": `Link to sample ${sample.key}` }, sample.key);
    link.addEventListener("click", () => reach(number));
    const head = make("header", {}, make("h3", { id }, sample.prompt),
      make("p", { class: "about" }, sample.tag ? make("span", { class: "tag" }, sample.tag) : null,
        severalSteps ? make("span", { class: "tag" }, `iteration ${sample.step}`) : null, outcomeOf(sample), link));
    const visible = [...sample.turns.keys()].filter((index) => isShown(sample, index));
    const turns = make("ol", { class: `turns of${Math.min(visible.length, 6)}` },
      ...visible.map((index) => turnOf(sample, number, index)));
    const about = { class: "sample", tabindex: "-1", "aria-labelledby": id, "data-number": number };
    const answers = sample.answers?.length ? answersOf(sample.answers) : null;
    const element = make("article", about, head, turns, answers);
    const more = make("button", { type: "button", class: "more", "aria-expanded": "false", hidden: true },
      "Whole texts");
    more.addEventListener("click", () => {
      const whole = element.classList.toggle("whole");
      more.setAttribute("aria-expanded", whole);
      more.textContent = whole ? "Short texts" : "Whole texts";
    });
    turns.after(more);
    return element;
  }

  // --- the list

  const list = find("samples"), status = find("shown");
  const pages = () => Math.max(Math.ceil(shown.length / PAGE), 1);
  const cardOf = (number) => list.querySelector(`[data-number="${number}"]`);

  function say(more) {
    const scores = shown.map((number) => finalScore(samples[number])).filter(known);
    const right = scores.filter(isRight).length;
    const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
    const extra = scores.length ? make("span", { class: "quiet" },
      ` · mean score ${mean.toFixed(2)}, ${right} right (${Math.round(100 * right / scores.length)} %)`) : null;
    const count = make("strong", {}, `${shown.length} of ${samples.length} shown`);
    status.replaceChildren(count, ...extra ? [extra] : [], more ?? "");
  }

  function mark() {
    CSS.highlights?.delete("found");
    const terms = words();
    if (!terms.length || !CSS.highlights) return;
    const ranges = [];
    for (const element of list.querySelectorAll("h3, .said p")) {
      const node = element.firstChild, text = node?.data.toLowerCase() ?? "";
      for (const term of terms) {
        let at = text.indexOf(term);
        while (at >= 0 && at + term.length <= node.length) {
          const range = new Range();
          range.setStart(node, at);
          range.setEnd(node, at + term.length);
          ranges.push(range);
          at = text.indexOf(term, at + term.length);
        }
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  // Only the layout knows whether a card cuts a text short.
  function offerWhole() {
    const cards = [...list.children], tall = (text) => text.scrollHeight > text.clientHeight + 1;
    const cut = cards.map((element) => element.classList.contains("whole") ||
      [...element.querySelectorAll(".said p")].some(tall));
    cards.forEach((element, index) => { element.querySelector(".more").hidden = !cut[index]; });
  }

  function render() {
    page = Math.min(page, pages() - 1);
    list.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(card));
    find("nothing").hidden = shown.length > 0;
    find("page").value = page + 1;
    find("page").max = pages();
    find("pages").textContent = `of ${pages()}`;
    for (const id of ["previous", "previous-below"]) find(id).disabled = page === 0;
    for (const id of ["next", "next-below"]) find(id).disabled = page >= pages() - 1;
    for (const nav of document.querySelectorAll(".pager")) nav.hidden = pages() === 1;
    if (current !== null) cardOf(current)?.setAttribute("aria-current", "true");
    say();
    mark();
    offerWhole();
  }

  function become(number) {
    if (number === current) return;
    list.querySelector("[aria-current]")?.removeAttribute("aria-current");
    current = number;
    if (number !== null) cardOf(number)?.setAttribute("aria-current", "true");
    remember();
  }

  function reach(number) {
    const element = cardOf(number);
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "start" });
  }

  function turnPage(to, focus) {
    page = Math.min(Math.max(to, 0), pages() - 1);
    current = null;
    render();
    remember();
    if (focus) find("gallery").focus();
    find("browser").scrollIntoView({ block: "start" });
  }

  function move(by) {
    const place = shown.indexOf(current);
    const next = place < 0 ? page * PAGE : place + by;
    if (!(next in shown)) return;
    if (Math.floor(next / PAGE) !== page) {
      page = Math.floor(next / PAGE);
      render();
    }
    become(shown[next]);
    if (view.open) openView(0); else reach(current);
  }

  function setBoxes(on) {
    boxes = on;
    document.body.classList.toggle("with-boxes", on);
    const button = find("boxes");
    if (!button) return;
    button.setAttribute("aria-pressed", on);
    button.querySelector(".state").textContent = on ? "on" : "off";
  }

  function refilter() {
    const before = current;
    select();
    current = null;
    page = 0;
    if (shown.includes(before)) {
      current = before;
      page = Math.floor(shown.indexOf(before) / PAGE);
    }
    render();
    remember();
  }

  function toggleBoxes() {
    setBoxes(!boxes);
    for (const link of list.querySelectorAll(".link")) {
      link.setAttribute("href", address({ sample: samples[link.closest(".sample").dataset.number].key }));
    }
    remember();
  }

  // --- the large view

  const view = find("view"), help = find("help");

  function openView(index) {
    const sample = samples[current], turn = sample.turns[index];
    viewed = index;
    find("view-title").textContent = sample.prompt;
    find("view-about").textContent = [sample.key, sample.tag, severalSteps ? `iteration ${sample.step}` : "",
      `sample ${shown.indexOf(current) + 1} of ${shown.length}`].filter(Boolean).join(" · ");
    const large = picture(sample, turn, index);
    large.querySelector("img").decoding = "sync";  // from turn to turn without an empty frame
    view.querySelector(".stage").replaceChildren(large,
      make("div", { class: "side" }, make("h3", {}, label(turn, index)), facts(sample, index)));
    const strip = find("strip"), focused = strip.contains(document.activeElement);
    strip.replaceChildren(...sample.turns.map((other, number) => {
      const score = known(other.score) ? other.score.toFixed(2) + (isRight(other.score) ? " ✓" : "") : "–";
      const button = make("button", { type: "button", "aria-pressed": String(number === index) }, label(other, number),
        make("span", { class: "quiet" }, score));
      button.addEventListener("click", () => openView(number));
      return button;
    }));
    if (focused) strip.children[index].focus();
    find("turn-before").disabled = index === 0;
    find("turn-after").disabled = index === sample.turns.length - 1;
    find("view-said").textContent = `${label(turn, index)}, turn ${index + 1} of ${sample.turns.length}`;
    if (!view.open) {
      view.showModal();
      find("view-title").focus();
    }
    remember();
  }

  function otherTurn(by) {
    if (samples[current].turns[viewed + by]) openView(viewed + by);
  }

  view.addEventListener("close", () => {
    viewed = null;
    remember();
    if (current !== null && cardOf(current)) reach(current);
  });
  find("turn-before").addEventListener("click", () => otherTurn(-1));
  find("turn-after").addEventListener("click", () => otherTurn(1));
  for (const dialog of [view, help]) {
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }

  // --- keys

  const KEYS = {
    j: () => move(1), k: () => move(-1), b: () => find("boxes") && toggleBoxes(),
    o: () => current !== null && !view.open && openView(0),
    "/": () => !view.open && form.elements.q.focus(),
    "?": () => help.open ? help.close() : help.showModal(),
  };
  const ON_CARD = { ArrowDown: KEYS.j, ArrowUp: KEYS.k, Enter: KEYS.o };
  const IN_VIEW = {
    ArrowLeft: () => otherTurn(-1), ArrowRight: () => otherTurn(1), ArrowDown: KEYS.j, ArrowUp: KEYS.k,
  };

  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (target.matches("input, select, textarea")) {
      if (key === "Escape" && target === form.elements.q && target.value === "") target.blur();
      return;
    }
    const more = view.open ? IN_VIEW : target.matches(".sample") ? ON_CARD : {};
    const action = help.open ? (key === "?" ? KEYS["?"] : null) : more[key] ?? KEYS[key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  // --- events

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", refilter);
  form.addEventListener("reset", () => setTimeout(refilter));
  list.addEventListener("focusin", (event) => {
    if (viewed !== null) return;  // a closing view gives the focus back to where it was opened
    become(Number(event.target.closest(".sample").dataset.number));
  });
  find("boxes")?.addEventListener("click", toggleBoxes);
  find("keys").addEventListener("click", KEYS["?"]);
  find("page").addEventListener("change", (event) => turnPage(Number(event.target.value) - 1 || 0, false));
  find("previous").addEventListener("click", () => turnPage(page - 1, false));
  find("next").addEventListener("click", () => turnPage(page + 1, false));
  find("previous-below").addEventListener("click", () => turnPage(page - 1, true));
  find("next-below").addEventListener("click", () => turnPage(page + 1, true));
  addEventListener("hashchange", restore);
  addEventListener("resize", offerWhole);
  find("browser").hidden = false;
  restore({ type: "load" });
})();
