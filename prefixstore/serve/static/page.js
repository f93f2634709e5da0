// The page: asks /v1/overview every two seconds and draws what it says. No library, no build step.
// Nothing the server says is ever taken for markup: all text is set as text.
"use strict";

const POLL_MS = 2000, GONE_MS_MAX = 10000, ANSWER_MS = 6000;
// How far back charts go, and how wide a column is then: as much as there is, so that a server that
// has just started fills its charts.
const WINDOWS = [[120, 4], [300, 6], [600, 10]], HISTORY_S = 600;
const TOKEN = "prefixstore-token";
const COLUMNS = ["time_s", "memory_bytes", "disk_bytes", "found_memory", "found_disk",
  "found_missing", "received_bytes_s", "sent_bytes_s", "requests_s"];
const WHY = {
  absent: "not stored", expired: "expired", being_stored: "being stored",
  other_content: "other content", stored_since: "stored since",
};
const KIND = { stored: "stored", promoted: "disk to memory", written: "memory to disk", removed: "left" };

const $ = (id) => document.getElementById(id);
let past = noPast(), startedS = 0, waitMs = POLL_MS, timer = 0, lastAnswerS = 0, asking = false;
let windowS = WINDOWS[0][0], columnS = WINDOWS[0][1];

function noPast() {
  return Object.fromEntries(COLUMNS.map((name) => [name, []]));
}

// ------------------------------------------------------------------ words and numbers
function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) { count /= 1024; unit++; }
  return [unit && count < 100 ? count.toFixed(count < 10 ? 2 : 1) : String(Math.round(count)), units[unit]];
}
const size = (count) => bytes(count).join(" ");
function amount(count) {
  if (count < 10000) return String(Math.round(count));
  if (count < 1e6) return (count / 1e3).toFixed(count < 1e5 ? 1 : 0) + "k";
  return (count / 1e6).toFixed(count < 1e8 ? 1 : 0) + "M";
}
function rate(perS) { return perS >= 100 ? amount(perS) : perS.toFixed(perS < 10 && perS > 0 ? 1 : 0); }
function ms(value) {
  if (value === null) return "\u2013";
  return value >= 100 ? String(Math.round(value)) : value.toFixed(value < 1 ? 2 : 1);
}
function span(seconds) {
  if (seconds < 90) return Math.max(0, Math.round(seconds)) + " s";
  if (seconds < 5400) return Math.round(seconds / 60) + " min";
  return seconds < 172800 ? Math.round(seconds / 3600) + " h" : Math.round(seconds / 86400) + " d";
}
const clock = (timeS) => new Date(timeS * 1000).toLocaleTimeString([], { hour12: false });
const short = (model) => model.replace("ForCausalLM", "");
const percent = (part, whole) => (whole ? Math.round(100 * part / whole) : 0);

// ------------------------------------------------------------------ elements
function make(tag, attributes, ...children) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) one.setAttribute(name, value);
  one.append(...children);
  return one;
}
function draw(tag, attributes) {
  const one = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  return one;
}
function number(id, value, unit) {
  $(id).replaceChildren(value, " ", make("small", {}, unit));
}
function facts(id, pairs) {
  $(id).replaceChildren(...pairs.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}
function shares(id, parts, whole, label) {
  const bar = $(id);
  while (bar.children.length > parts.length) bar.lastChild.remove();
  parts.forEach(([name, part], i) => {
    const piece = bar.children[i] || bar.appendChild(make("i"));
    piece.className = name;
    piece.style.width = whole ? 100 * part / whole + "%" : "0";
  });
  bar.setAttribute("aria-label", label);
}
function rows(id, cells) {
  const table = $(id), body = table.tBodies[0];
  body.replaceChildren(...cells.map((row) => make("tr", {}, ...row)));
  const none = cells.length === 0;
  table.parentElement.hidden = none;
  table.parentElement.nextElementSibling.hidden = !none;
}
const cell = (text, kind, title) => make("td", { ...(kind && { class: kind }), ...(title && { title }) }, text);

// ------------------------------------------------------------------ charts
function canvas(id, width, height, label) {
  const svg = $(id);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", label);
  svg.replaceChildren();
  return svg;
}
function line(id, values, most, nowS, label) {
  const svg = canvas(id, windowS, 100, label);
  if (values.length < 2 || most <= 0) return;
  const start = past.time_s.findIndex((timeS) => timeS >= nowS - windowS);
  const points = values.slice(start).map((value, i) => {
    const x = windowS - (nowS - past.time_s[start + i]);
    return `${x.toFixed(1)},${(99 - 96 * Math.min(1, value / most)).toFixed(2)}`;
  });
  const first = points[0].split(",")[0], last = points[points.length - 1].split(",")[0];
  svg.append(
    draw("path", { class: "area", d: `M${first},100 L${points.join(" L")} L${last},100 Z` }),
    draw("path", { class: "line", d: `M${points.join(" L")}` }));
}
function columns(id, nowS, label) {
  const count = windowS / columnS, names = ["memory", "disk", "missing"];
  const sums = Array.from({ length: count }, () => [0, 0, 0]);
  past.time_s.forEach((timeS, i) => {
    // Columns stand on whole multiples of their width, so that they do not shimmer from draw to draw.
    const at = count - 1 - (Math.floor(nowS / columnS) - Math.floor(timeS / columnS));
    if (at >= 0 && at < count) names.forEach((name, k) => { sums[at][k] += past["found_" + name][i]; });
  });
  const most = Math.max(...sums.map((one) => one[0] + one[1] + one[2]));
  const svg = canvas(id, count, 100, label);
  if (!most) return;
  sums.forEach((one, x) => {
    let top = 100;
    one.forEach((value, k) => {
      const height = 97 * value / most;
      top -= height;
      if (value) svg.append(draw("rect", { class: names[k], x: x + .1, y: top.toFixed(2), width: .8, height: height.toFixed(2) }));
    });
  });
}
function range(low, mid, high, scale) {
  const at = (value) => (100 * Math.log(Math.max(value, scale[0]) / scale[0]) / Math.log(scale[1] / scale[0])).toFixed(1) + "%";
  const svg = draw("svg", { "aria-hidden": "true" });
  for (let tick = scale[0]; tick <= scale[1] * 1.01; tick *= 10) {
    svg.append(draw("line", { class: "grid", x1: at(tick), x2: at(tick), y1: 0, y2: 14 }));
  }
  if (low !== null) {
    svg.append(
      draw("line", { class: "span", x1: at(low), x2: at(high), y1: 7, y2: 7 }),
      draw("circle", { class: "mark", cx: at(low), cy: 7, r: 3.5 }),
      draw("circle", { class: "mark", cx: at(high), cy: 7, r: 2 }));
  }
  return svg;
}

// ------------------------------------------------------------------ panels
function showFound(told) {
  const lately = told.found_lately, there = lately.memory + lately.disk, all = there + lately.missing;
  if (all) $("found-rate").replaceChildren(String(percent(there, all)), make("small", {}, " %"));
  else $("found-rate").replaceChildren("\u2013");
  $("found-hint").hidden = told.found.memory + told.found.disk + told.found.missing > 0;
  const parts = [["memory", lately.memory], ["disk", lately.disk], ["missing", lately.missing]];
  $("found-legend").replaceChildren(...parts.map(([name, part]) => make("div", {},
    make("dt", {}, make("span", { class: "swatch " + name, "aria-hidden": "true" }), { memory: "in memory", disk: "on disk", missing: "missing" }[name]),
    make("dd", {}, all ? `${percent(part, all)} %` : "\u2013"))));
  const words = all ? `${percent(lately.memory, all)} % in memory, ${percent(lately.disk, all)} % on disk, ${percent(lately.missing, all)} % missing`
    : "no prompt was looked up in the last minute";
  shares("found-share", parts, all, words);
  columns("found-chart", told.time_s, "Chunks looked up; in the last minute " + words);
}
function showTier(told, name, flows) {
  const tier = told.tiers[name] || { cap_bytes: 0, used_bytes: 0, pinned_bytes: 0, unwritten_chunks: 0 };
  const chunks = told.namespaces.reduce((sum, one) => sum + (one.chunks[name] || 0), 0);
  if (!tier.cap_bytes) {
    $(name + "-used").replaceChildren("off");
    facts(name + "-facts", []);
    shares(name + "-share", [], 0, "off");
    line(name + "-chart", [], 0, told.time_s, "off");
    return;
  }
  number(name + "-used", size(tier.used_bytes), "of " + size(tier.cap_bytes));
  const words = `${percent(tier.used_bytes, tier.cap_bytes)} % in use`;
  shares(name + "-share", [[name, tier.used_bytes]], tier.cap_bytes, words);
  const more = told.namespaces_more ? "+" : "";
  facts(name + "-facts", [["chunks", amount(chunks) + more], ...flows,
    ...(tier.pinned_bytes ? [["pinned", size(tier.pinned_bytes)]] : []),
    ...(tier.unwritten_chunks ? [["not on disk yet", amount(tier.unwritten_chunks)]] : [])]);
  line(name + "-chart", past[name + "_bytes"], tier.cap_bytes, told.time_s, `${name} tier, now ${words}`);
}
function showTraffic(told) {
  const rates = told.rates;
  for (const [id, column] of [["out", "sent_bytes_s"], ["in", "received_bytes_s"]]) {
    const [value, unit] = bytes(rates[column]);
    number(id + "-rate", value, unit + "/s");
    line(id + "-chart", past[column], Math.max(...past[column], 1), told.time_s, `${id}, most ${size(Math.max(...past[column], 0))}/s`);
  }
  number("request-rate", rate(rates.requests_s), "/s");
  line("request-chart", past.requests_s, Math.max(...past.requests_s, 1), told.time_s, "requests a second");
}
function showLatency(told) {
  const shown = told.routes.filter((one) =>
    one.route.startsWith("/v1/") && one.route !== "/v1/overview" && one.requests_lately);
  const low = Math.min(...shown.map((one) => one.p50_ms), 1), high = Math.max(...shown.map((one) => one.p99_ms), 1);
  const scale = [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high) + 1e-9)];
  if (scale[1] <= scale[0]) scale[1] = scale[0] * 10;
  $("latency-scale").textContent = shown.length ? `p50 to p99, ${scale[0]} to ${scale[1]} ms` : "p50 to p99";
  rows("latency", shown.map((one) => {
    const picture = cell("", "wide range");
    picture.append(range(one.p50_ms, one.p90_ms, one.p99_ms, scale));
    return [cell(one.route.replace("/v1/", "")), picture, cell(ms(one.p50_ms), "n"), cell(ms(one.p90_ms), "n wide"),
      cell(ms(one.p99_ms), "n"), cell(amount(one.requests_lately), "n"), cell(one.failed ? amount(one.failed) : "", "n wide soft")];
  }));
}
function showMisses(told, models) {
  const counts = {};
  for (const one of told.misses) counts[one.why] = (counts[one.why] || 0) + 1;
  const sum = Object.entries(counts).sort((a, b) => b[1] - a[1]).slice(0, 3);
  $("misses-sum").textContent = sum.map(([why, count]) => `${count} ${WHY[why] || why}`).join(", ");
  rows("misses", told.misses.map((one) => [
    make("td", {}, make("span", { class: "why " + one.why }, WHY[one.why] || one.why)),
    cell(`${one.found_chunks} of ${one.asked_chunks}`, "n"),
    cell(short(models.get(one.namespace) || one.namespace.slice(0, 8)), "", one.namespace + (one.tenant === "local" ? "" : ", tenant " + one.tenant)),
    cell(one.request_id, "wide soft key", `request ${one.request_id}, first missing chunk ${one.key}`),
    cell(span(told.time_s - one.time_s), "n soft", clock(one.time_s)),
  ]));
}
function showTexts(told, models) {
  const most = Math.max(...told.texts.map((one) => one.prompts), 1);
  rows("texts", told.texts.map((one) => {
    const name = make("td", { class: "bar", title: `${one.key}, ${models.get(one.namespace) || one.namespace}` });
    const bar = make("i");
    bar.style.width = 100 * one.prompts / most + "%";
    name.append(bar, make("span", one.tag ? {} : { class: "key" }, one.tag || one.key.slice(0, 16)));
    return [name, cell(amount(one.longest_tokens) + " tokens", "n soft"), cell(amount(one.prompts), "n")];
  }));
}
function asked(one) {
  const told = cell(amount(one.requests), "n", `${one.refused} of ${one.requests} refused`);
  if (one.refused) told.prepend(make("span", { class: "bad" }, `${amount(one.refused)} refused of `));
  return told;
}
function showRest(told) {
  $("spaces-sum").textContent = told.namespaces_more ? `and ${told.namespaces_more} more` : "";
  rows("spaces", told.namespaces.map((one) => [
    cell(short(one.model), "", one.model), cell(one.namespace.slice(0, 12), "wide soft key", one.namespace), cell(one.tenant || "\u2013"),
    cell(size(one.chunk_bytes), "n wide soft", `${one.chunk_tokens} tokens`),
    cell(size(one.bytes.memory || 0), "n", `${one.chunks.memory} chunks`), cell(size(one.bytes.disk || 0), "n", `${one.chunks.disk} chunks`)]));
  rows("clients", told.clients.map((one) => [
    cell(one.tenant), cell(one.way), asked(one), cell(size(one.received_bytes), "n"),
    cell(size(one.sent_bytes), "n"), cell(span(told.time_s - one.last_s), "n wide soft", clock(one.last_s))]));
  rows("activity", told.activity.map((one) => [
    cell(one.kind === "removed" ? `left ${one.tier}` : KIND[one.kind] || one.kind), cell(amount(one.chunks), "n"),
    cell(size(one.bytes), "n soft"), cell(span(told.time_s - one.time_s), "n soft", clock(one.time_s))]));
}
function show(told) {
  const rates = told.rates, models = new Map(told.namespaces.map((one) => [one.namespace, one.model]));
  const upS = told.time_s - told.started_s;
  [windowS, columnS] = WINDOWS.find(([seconds]) => seconds >= upS) || WINDOWS[WINDOWS.length - 1];
  for (const one of document.querySelectorAll(".ago")) one.textContent = `${windowS / 60} min ago`;
  for (const one of document.querySelectorAll(".each")) one.textContent = `each ${columnS} s`;
  showFound(told);
  showTier(told, "memory", [["stored/s", rate(rates.stored_s)], ["promoted/s", rate(rates.promoted_s)], ["left/s", rate(rates.removed_memory_s)]]);
  showTier(told, "disk", [["written/s", rate(rates.written_s)], ["left/s", rate(rates.removed_disk_s)]]);
  showTraffic(told);
  showLatency(told);
  showMisses(told, models);
  showTexts(told, models);
  showRest(told);
  $("where").textContent = location.host + (told.read_only ? ", read only" : "");
  $("about").textContent = `prefixstore ${told.version}, up ${span(told.time_s - told.started_s)}, ${told.leases} leases, ${told.listeners} listeners`;
}

// ------------------------------------------------------------------ asking
function remember(told) {
  if (told.started_s !== startedS) { past = noPast(); startedS = told.started_s; }
  for (const name of COLUMNS) {
    past[name].push(...told.history[name]);
  }
  const old = past.time_s.findIndex((timeS) => timeS > told.time_s - HISTORY_S);
  if (old > 0) for (const name of COLUMNS) past[name].splice(0, old);
}
function become(state, text, banner, isBad) {
  document.body.dataset.state = state;
  if ($("state-text").textContent !== text) $("state-text").textContent = text;
  const line = banner || "";
  if ($("banner").textContent !== line) $("banner").textContent = line;
  $("banner").hidden = !line;
  $("banner").classList.toggle("bad", Boolean(isBad));
}
function gate(problem) {
  $("main").hidden = true;
  $("gate").hidden = false;
  $("gate-problem").textContent = problem;
  $("about").textContent = "";
  $("json-link").hidden = $("metrics-link").hidden = $("forget").hidden = true;
  become("waiting", "token needed");
  $("token").focus();
}
async function ask() {
  const since = past.time_s.length ? past.time_s[past.time_s.length - 1] : 0;
  const token = sessionStorage.getItem(TOKEN);
  const stop = new AbortController(), late = setTimeout(() => stop.abort(), ANSWER_MS);
  try {
    const answer = await fetch(`/v1/overview?since_s=${since}`, {
      headers: token ? { Authorization: "Bearer " + token } : {}, signal: stop.signal, cache: "no-store",
    });
    if (answer.status === 401 || answer.status === 403) {
      if (sessionStorage.getItem(TOKEN) === token) sessionStorage.removeItem(TOKEN);
      gate(!token ? "" : answer.status === 403 ? "That token is of another tenant than local." : "That token was not accepted.");
      return false;
    }
    if (!answer.ok) throw new Error("status " + answer.status);
    const told = await answer.json();
    remember(told);
    lastAnswerS = Date.now() / 1000;
    waitMs = POLL_MS;
    $("gate").hidden = true;
    $("main").hidden = false;
    $("forget").hidden = !token;
    $("json-link").hidden = $("metrics-link").hidden = Boolean(token);
    become("live", told.draining ? "draining" : "live", told.draining ? "This server is being stopped: it takes no more puts." : "");
    show(told);
  } catch (error) {
    waitMs = Math.min(waitMs * 1.6, GONE_MS_MAX);
    const since = lastAnswerS ? `No answer from the server since ${clock(lastAnswerS)}. ` : "No answer from the server. ";
    become("gone", "no answer", `${since}Trying again every ${Math.round(waitMs / 1000)} s; what is below is old.`, true);
  } finally {
    clearTimeout(late);
  }
  return true;
}
async function turn() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  const goOn = await ask();
  asking = false;
  if (goOn) timer = setTimeout(turn, waitMs);
}

$("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  turn();
});
$("forget").addEventListener("click", () => { sessionStorage.removeItem(TOKEN); clearTimeout(timer); turn(); });
document.addEventListener("visibilitychange", turn);
window.addEventListener("online", turn);
$("found-command").textContent = `prefixstore connect ${location.origin} --model MODEL`;
turn();
