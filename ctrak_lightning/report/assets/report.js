"use strict";
(() => {
  const PAGE = 25;
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const value = (column, sample) => data.columns[column].values[data.columns[column].codes[sample]];
  const searchable = new Map();

  // All that comes from the data set goes through here, as text nodes: it is never parsed as markup.
  function element(tag, { text, title, className, ...attributes } = {}, ...children) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (title !== undefined) made.title = title;
    if (className) made.className = className;
    for (const [name, content] of Object.entries(attributes)) made.setAttribute(name, content);
    made.append(...children);
    return made;
  }

  function picture(sample, className) {
    const index = data.pictures[sample];
    if (index === undefined) return null;
    const image = element("img", { alt: `Training image ${data.ids[sample]}`, className });
    image.src = data.thumbnails[index];
    return image;
  }

  function words(sample) {
    if (!searchable.has(sample)) {
      const all = [data.ids[sample], ...data.columns.map((_, column) => value(column, sample))];
      searchable.set(sample, all.join("\n").toLowerCase());
    }
    return searchable.get(sample);
  }

  class Ranking {
    constructor(section) {
      this.section = section;
      this.concept = data.concepts[Number(section.dataset.concept)];
      this.largest = Math.max(...[0, -1].map((end) => Math.abs(this.concept.scores.at(end)))) || 1;
      this.body = section.querySelector(".ranking tbody");
      this.status = section.querySelector("[data-part=status]");
      this.filters = [...section.querySelectorAll("[data-filter]")];
      this.sort = { key: "rank", sign: 1 };
      this.start = 0;
      for (const filter of this.filters) {
        const isSelect = filter.tagName === "SELECT";
        if (isSelect) this.fillOptions(filter);
        filter.addEventListener(isSelect ? "change" : "input", () => this.refresh());
      }
      for (const button of section.querySelectorAll("[data-sort]")) {
        button.addEventListener("click", () => this.sortBy(button.dataset.sort));
      }
      for (const [action, run] of [["clear", () => this.clear()], ["previous", () => this.turn(-1)], ["next", () => this.turn(1)]]) {
        section.querySelector(`[data-action=${action}]`).addEventListener("click", run);
      }
      section.addEventListener("click", (event) => {
        const opener = event.target.closest("[data-row]");
        if (opener) detail.show(this.concept, Number(opener.dataset.row));
      });
      this.refresh();
    }

    fillOptions(select) {
      const column = data.columns[data[select.dataset.filter]];
      const counts = new Map();
      for (const sample of this.concept.samples) counts.set(column.codes[sample], (counts.get(column.codes[sample]) ?? 0) + 1);
      const order = [...counts.keys()].sort((a, b) => collator.compare(column.values[a], column.values[b]));
      for (const code of order) {
        const label = column.values[code] || "(not stated)";
        select.append(element("option", { value: code, text: `${label.slice(0, 80)} (${counts.get(code)})` }));
      }
    }

    clear() {
      for (const filter of this.filters) filter.value = "";
      this.refresh();
      this.filters[0].focus();
    }

    sortBy(key) {
      this.sort = { key, sign: this.sort.key === key ? -this.sort.sign : key === "score" ? -1 : 1 };
      for (const button of this.section.querySelectorAll("[data-sort]")) {
        const header = button.closest("th");
        if (button.dataset.sort === key) header.setAttribute("aria-sort", this.sort.sign > 0 ? "ascending" : "descending");
        else header.removeAttribute("aria-sort");
      }
      this.refresh();
    }

    turn(by) {
      this.start += by * PAGE;
      this.draw();
      keepFocus(this.section, "previous", "next");
    }

    refresh() {
      const { samples, scores } = this.concept;
      const wanted = Object.fromEntries(this.filters.map((filter) => [filter.dataset.filter, filter.value]));
      const text = wanted.text.trim().toLowerCase();
      const fits = (sample) =>
        ["group", "licence"].every((name) => !wanted[name] || data.columns[data[name]].codes[sample] === Number(wanted[name])) &&
        (!text || words(sample).includes(text));
      this.rows = [...samples.keys()].filter((row) => fits(samples[row]));
      const { key, sign } = this.sort;
      if (key === "rank") this.rows.sort((a, b) => sign * (a - b));
      else if (key === "score") this.rows.sort((a, b) => sign * (scores[a] - scores[b]) || a - b);
      else {
        const text = (row) => (key === "id" ? data.ids[samples[row]] : value(data[key], samples[row]));
        this.rows.sort((a, b) => sign * collator.compare(text(a), text(b)) || a - b);
      }
      this.start = 0;
      this.draw();
    }

    draw() {
      const shown = this.rows.slice(this.start, this.start + PAGE);
      this.body.replaceChildren(...shown.map((row) => this.row(row)));
      const total = this.concept.samples.length.toLocaleString("en");
      const found = this.rows.length.toLocaleString("en");
      this.status.textContent = shown.length
        ? `Rows ${(this.start + 1).toLocaleString("en")} to ${(this.start + shown.length).toLocaleString("en")} of ${found}` +
          (this.rows.length < this.concept.samples.length ? ` that fit, of ${total} in all.` : ".")
        : `None of ${total} images fits.`;
      this.section.querySelector("[data-action=previous]").disabled = this.start === 0;
      this.section.querySelector("[data-action=next]").disabled = this.start + PAGE >= this.rows.length;
    }

    row(row) {
      const sample = this.concept.samples[row];
      const score = this.concept.scores[row];
      const label = `Enlarge ${data.ids[sample]}`;
      const opener = element("button", { type: "button", "data-row": row, "aria-label": label, "aria-haspopup": "dialog" });
      const image = picture(sample);
      opener.append(image ?? "Details");
      if (image) opener.className = "plain";
      const meter = element("span", { className: score < 0 ? "meter opponent" : "meter", "aria-hidden": "true" }, element("span"));
      meter.firstChild.style.width = `${Math.min(100, (100 * Math.abs(score)) / this.largest)}%`;
      const texts = ["group", "licence", "caption"].filter((name) => this.section.querySelector(`[data-sort=${name}]`));
      return element(
        "tr",
        {},
        element("td", { text: this.concept.ranks[row].toLocaleString("en") }),
        element("td", {}, opener),
        textCell(data.ids[sample]),
        ...texts.map((name) => textCell(value(data[name], sample))),
        element("td", { className: "number", text: score.toFixed(2) }, meter),
      );
    }
  }

  // A button that has just become useless gives its focus to its neighbour, or the keyboard would start again at the top.
  function keepFocus(where, ...actions) {
    const [a, b] = actions.map((action) => where.querySelector(`[data-action=${action}]`));
    if (a.disabled) b.focus();
    else if (b.disabled) a.focus();
  }

  function textCell(text) {
    return element("td", { className: "text", dir: "auto" }, element("span", { text: text.slice(0, 300) }));
  }

  const detail = {
    dialog: document.getElementById("detail"),

    show(concept, row) {
      this.concept = concept;
      this.row = row;
      const sample = concept.samples[row];
      const facts = [
        ["Rank", concept.ranks[row].toLocaleString("en")],
        ["Score", concept.scores[row].toFixed(4)],
        ...data.columns.map((column, index) => [column.name, value(index, sample), column.links?.[column.codes[sample]]]),
        ...this.numbers(row),
      ];
      const list = element("dl");
      for (const [name, text, isLink] of facts) {
        const shown = isLink ? element("a", { text, href: text, rel: "noreferrer noopener", target: "_blank" }) : text;
        list.append(element("dt", { text: name }), element("dd", { dir: "auto" }, shown));
      }
      this.open(data.ids[sample], [picture(sample, "pixels") ?? element("p", { text: "This page holds no picture of it." }), list], true);
      for (const [action, end] of [["better", 0], ["worse", concept.samples.length - 1]]) {
        this.dialog.querySelector(`[data-action=${action}]`).disabled = row === end;
      }
    },

    step(by) {
      this.show(this.concept, this.row + by);
      keepFocus(this.dialog, "better", "worse");
    },

    numbers(row) {
      const at = this.concept.detailed.indexOf(row);
      if (at < 0) return [];
      const signed = (number) => number.toFixed(2);
      const found = [["Score at each checkpoint", data.steps.map((step, i) => `step ${step}: ${signed(this.concept.timeline[i][at])}`).join("\n")]];
      if (this.concept.by_timestep) {
        const steps = this.concept.timesteps.map((t, i) => [t, this.concept.by_timestep[i][at]]).sort((a, b) => b[0] - a[0]);
        found.push(["Score by denoising step", steps.map(([t, part]) => `t = ${t}: ${signed(part)}`).join("\n")]);
        const layers = Object.entries(this.concept.by_layer_group).sort((a, b) => b[1][at] - a[1][at]);
        found.push(["Score by layers", layers.map(([name, parts]) => `${name}: ${signed(parts[at])}`).join("\n")]);
      }
      return found;
    },

    open(title, content, steps) {
      this.dialog.querySelector("#detail-title").textContent = title;
      this.dialog.querySelector("[data-part=body]").replaceChildren(...content);
      this.dialog.querySelector("[data-part=steps]").hidden = !steps;
      if (!this.dialog.open) this.dialog.showModal();
    },

    listen() {
      const act = {
        close: () => this.dialog.close(),
        better: () => this.step(-1),
        worse: () => this.step(1),
      };
      this.dialog.addEventListener("click", (event) => {
        if (event.target === this.dialog) this.dialog.close();
        const action = event.target.closest("[data-action]")?.dataset.action;
        if (action) act[action]();
      });
      const generated = document.getElementById("generated");
      generated?.addEventListener("click", () => {
        const image = generated.querySelector("img").cloneNode();
        image.className = generated.closest(".small") ? "wide pixels" : "wide";
        this.open(generated.closest("figure").querySelector("figcaption").textContent, [image], false);
      });
    },
  };

  detail.listen();
  for (const section of document.querySelectorAll("[data-concept]")) new Ranking(section);
  // A printed page has nobody to open what is folded.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
})();
