// The status page: asks for the document once a second, shows one page of it. All that comes from
// the document goes in as text, never as markup.
"use strict";

const PERIOD_MS = 1000;
const PATIENCE_MS = 6000;
const PAGE_JOBS = 50;
const SAMPLES = 300; // of the small chart, one each period

const $ = (id) => document.getElementById(id);
const view = { state: "", search: "", offset: 0, etag: null, isPaused: false, asked: 0, samples: [] };

function number(value) {
  return value === null ? "–" : value.toLocaleString("en");
}

function seconds(value) {
  if (value === null) return "–";
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
}

function element(name, className, ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

function show(id, ...content) {
  $(id).replaceChildren(...content);
}

function describe(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value, className]) => [
    element("dt", "", name), element("dd", className || "", value),
  ]));
}

function bar(job, longest) {
  const track = element("div", "track");
  const part = (className, from, to) => {
    const piece = element("i", className);
    piece.style.left = `${(100 * from) / longest}%`;
    if (to !== undefined) piece.style.width = `${(100 * Math.max(to - from, 0)) / longest}%`;
    track.append(piece);
  };
  let said = `${job.output_tokens} tokens so far`;
  if (job.p50_tokens !== null) {
    part("span", job.p10_tokens, job.p90_tokens);
    part("tick", job.p50_tokens);
    said += `, predicted ${job.p10_tokens} to ${job.p90_tokens}, median ${job.p50_tokens}`;
  }
  if (job.output_tokens) part("done", 0, job.output_tokens);
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", said);
  track.title = said;
  return track;
}

function chip(className, text, said) {
  const made = element("span", `chip ${className}`, text);
  made.title = said;
  made.append(element("span", "unseen", ` (${said})`));
  return made;
}

function order(job) {
  const cell = element("td", "order");
  if (job.overtakes) cell.append(chip("good", `▲ ${number(job.overtakes)}`, `ahead of ${number(job.overtakes)} that came earlier`));
  if (job.overtaken) {
    const names = job.overtaken_by;
    const some = names.length ? `: ${names.join(", ")}${job.overtaken > names.length ? ", …" : ""}` : ", all of them done";
    cell.append(chip("", `▼ ${number(job.overtaken)}`, `passed by ${number(job.overtaken)} that came later${some}`));
    // The first name is enough to look for; all that are known are a hover away.
    if (names.length) cell.append(element("span", "dim id", names[0]));
  }
  return cell;
}

function row(job, longest) {
  const name = element("td", "", element("span", "id", job.id));
  const times = job.preemptions ? ` ${job.preemptions}×` : "";
  if (job.state === "preempted") name.append(element("span", "state preempted", `preempted${times}`));
  else name.append(element("span", `state ${job.state}`, job.state));
  if (job.preemptions && job.state !== "preempted") name.append(chip("again", times, `preempted ${job.preemptions} times`));
  const median = job.p50_tokens === null ? "" : ` / ~${number(job.p50_tokens)}`;
  const tokens = element("span", "", number(job.output_tokens), element("span", "dim", median));
  return element(
    "tr", "",
    element("td", "number dim", job.place === null ? "" : number(job.place)),
    name,
    element("td", "number", seconds(job.age_s)),
    element("td", "number dim", number(job.prompt_tokens)),
    element("td", "", element("div", "answer", tokens, bar(job, longest))),
    element("td", "number", seconds(job.remaining_s)),
    element("td", "number", job.place === null ? "" : seconds(job.ewt_s)),
    element("td", "number", seconds(job.boost_s)),
    order(job),
  );
}

function showJobs(jobs, hasEngine) {
  const total = jobs.running + jobs.waiting + jobs.preempted;
  show("count-all", number(total));
  show("count-running", number(jobs.running));
  show("count-queued", number(jobs.waiting + jobs.preempted));
  show("count-preempted", number(jobs.preempted));
  if (view.offset && !jobs.rows.length) {
    view.offset = Math.max(0, Math.floor((jobs.matching - 1) / PAGE_JOBS) * PAGE_JOBS);
    refresh();
    return;
  }
  const longest = Math.max(...jobs.rows.map((job) => Math.max(job.p90_tokens ?? 0, job.output_tokens)), 1);
  show("rows", ...jobs.rows.map((job) => row(job, longest)));
  $("empty").hidden = jobs.rows.length > 0;
  show("empty", total ? "No job matches." : hasEngine ? "No jobs: the engine is idle." : "No engine is connected.");
  const last = jobs.offset + jobs.rows.length;
  show("range", jobs.rows.length ? `${number(jobs.offset + 1)} to ${number(last)} of ${number(jobs.matching)}` : "");
  $("previous").disabled = jobs.offset === 0;
  $("next").disabled = last >= jobs.matching;
}

function showTiles(status) {
  const { jobs, engines, predictor, shadow } = status;
  const queued = jobs.waiting + jobs.preempted;
  const slots = engines.reduce((sum, engine) => sum + (engine.slots ?? 0), 0);
  show("running", number(jobs.running), element("small", "", slots ? ` of ${number(slots)} slots` : ""));
  show("running-note", `${number(status.since_start.finished)} finished since the start`);
  show("queued", number(queued));
  const longest = Math.max(0, ...engines.map((engine) => engine.longest_wait_s));
  show("queued-note", queued ? `oldest ${seconds(longest)}` + (jobs.preempted ? `, ${number(jobs.preempted)} preempted` : "") : "nobody waits");
  show("backlog", seconds(engines.reduce((sum, engine) => sum + engine.backlog_s, 0)));
  show("tau", predictor.tau_b === null ? "–" : `τ ${predictor.tau_b.toFixed(2)}`);
  $("tau-note").className = predictor.is_drifting ? "note bad" : "note";
  show("tau-note", !predictor.model_version ? `no model yet, ${number(predictor.samples)} samples`
    : predictor.is_drifting ? "drifting: a new model is under way" : `rank agreement, ${number(predictor.scored_jobs)} jobs`);
  const ratio = shadow ? shadow.mean_normalized_latency_ratio : null;
  $("shadow").className = ratio === null ? "figure" : ratio < 1 ? "figure good" : "figure bad";
  show("shadow", ratio === null ? "–" : `${ratio.toFixed(2)}×`);
  show("shadow-note", ratio === null ? "not enough finished jobs" : "of its mean normalized latency");
}

function showDetails(status) {
  const { predictor, shadow } = status;
  const share = (value) => (value === null ? "–" : `${Math.round(100 * value)} %`);
  describe($("predictor"), [
    ["Model", predictor.model_version ? `version ${predictor.model_version}` : "none: order is FCFS"],
    ["Trained", predictor.trained_unix_s ? `${seconds(Math.max(0, Date.now() / 1000 - predictor.trained_unix_s))} ago` : "–"],
    ["Samples", number(predictor.samples)],
    ["Kendall's tau-b", predictor.tau_b === null ? "–" : predictor.tau_b.toFixed(3)],
    ["Mean absolute error", predictor.mae_tokens === null ? "–" : `${number(Math.round(predictor.mae_tokens))} tokens`],
    ["At or below p50 (ideal 50 %)", share(predictor.p50_coverage)],
    ["At or below p90 (ideal 90 %)", share(predictor.p90_coverage)],
  ]);
  const times = (value) => (value === null ? "–" : `${value.toFixed(2)}×`);
  describe($("shadow-details"), shadow ? [
    ["Mean normalized latency", times(shadow.mean_normalized_latency_ratio)],
    ["Mean JCT", times(shadow.mean_jct_ratio)],
    ["p99 JCT", times(shadow.p99_jct_ratio)],
    ["Jobs replayed", number(shadow.jobs)],
  ] : [["Replayed from the jobs that end", "–"]]);
  show("engines", ...status.engines.map((engine) => {
    const list = element("dl", "");
    describe(list, [
      ["Running, in the queue", `${number(engine.running)}, ${number(engine.waiting + engine.preempted)}`],
      ["Gamma", `${engine.gamma_per_s.toPrecision(3)} /s`],
      ["An output token", `${(1000 * engine.decode_s_per_token).toFixed(1)} ms`],
      ["A prompt token", `${(1000 * engine.prefill_s_per_token).toFixed(2)} ms`],
    ]);
    const state = engine.is_connected ? element("span", "state running", "connected") : element("span", "state waiting", "away");
    return element("div", "engine", element("p", "", element("span", "id", engine.id), state), element("p", "dim", engine.model), list);
  }));
  if (!status.engines.length) show("engines", element("p", "dim", "none"));
  const models = [...new Set(status.engines.map((engine) => engine.model))].filter(Boolean);
  show("what", [`policy ${status.policy}`, ...models, `version ${status.version}`].join(" · "));
}

function showChart(jobs) {
  view.samples.push([jobs.running, jobs.waiting + jobs.preempted]);
  if (view.samples.length > SAMPLES) view.samples.shift();
  const top = Math.max(1, ...view.samples.flat());
  ["running", "queued"].forEach((name, index) => {
    const points = view.samples.map((sample, x) => `${(300 * x) / Math.max(view.samples.length - 1, 60)},${86 - (82 * sample[index]) / top}`);
    document.querySelector(`#chart .${name}`).setAttribute("points", points.join(" "));
  });
  show("scale", `most ${number(top)}`);
}

function showLink(state, text) {
  $("link").className = `link ${state}`;
  if ($("link").textContent !== text) show("link", text);
}

function notice(text) {
  $("notice").hidden = !text;
  if ($("notice").textContent !== text) show("notice", text);
}

function render(status) {
  showTiles(status);
  showDetails(status);
  showJobs(status.jobs, status.engines.some((engine) => engine.is_connected));
}

async function refresh() {
  const asked = ++view.asked; // a later question makes this one's answer old
  const query = new URLSearchParams({ offset: view.offset, limit: PAGE_JOBS });
  if (view.state) query.set("state", view.state);
  if (view.search) query.set("search", view.search);
  try {
    const headers = view.etag ? { "If-None-Match": view.etag } : {};
    const response = await fetch(`api/v1/status?${query}`, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (asked !== view.asked) return;
    if (response.status === 200) {
      const status = await response.json();
      if (asked !== view.asked) return;
      view.etag = response.headers.get("ETag");
      view.last = status;
      render(status);
    } else if (response.status !== 304) {
      throw new Error(`status ${response.status}`);
    }
    showChart(view.last.jobs);
    showLink("live", "live");
    notice("");
  } catch (error) {
    if (asked !== view.asked) return;
    showLink("lost", "no answer");
    notice("The sidecar does not answer. The engine serves on without it, in order of arrival. Trying again …");
  }
}

function ask() {
  view.etag = null;
  refresh();
}

async function follow() {
  if (!view.isPaused && !document.hidden) await refresh();
  setTimeout(follow, PERIOD_MS);
}

document.querySelectorAll("input[name=state]").forEach((input) => {
  input.addEventListener("change", () => {
    Object.assign(view, { state: input.value, offset: 0 });
    ask();
  });
});
$("search").addEventListener("input", () => {
  Object.assign(view, { search: $("search").value.trim(), offset: 0 });
  ask();
});
$("previous").addEventListener("click", () => {
  view.offset = Math.max(0, view.offset - PAGE_JOBS);
  ask();
});
$("next").addEventListener("click", () => {
  view.offset += PAGE_JOBS;
  ask();
});
$("pause").addEventListener("click", () => {
  view.isPaused = !view.isPaused;
  $("pause").setAttribute("aria-pressed", String(view.isPaused));
  if (view.isPaused) showLink("", "paused");
  else refresh();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !view.isPaused) refresh();
});
follow();
