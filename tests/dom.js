// node dom.js PAGE [#HASH] [SELECT=VALUE ...]: runs the script of a report as a browser would, on the few parts of the
// DOM that it may use, and prints the elements that it made as HTML. A use of anything else is an error.
"use strict";
const fs = require("fs"), vm = require("vm");
const [path, hash = "", ...choices] = process.argv.slice(2);
const html = fs.readFileSync(path, "utf8");
const source = html.match(/<script>([^]*?)<\/script>/)[1];
const json = html.match(/<script type="application\/json" id="data">([^]*?)<\/script>/)[1];
const listeners = [];
const escape = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt()};`);

class Element {
  constructor(tag) {
    Object.assign(this, {tag, parentNode: null, nodes: [], text: "", className: "", attributes: {}, events: {}});
    if (tag == "select") this.value = "";
    return new Proxy(this, {
      get: (target, name) => {
        if (!(name in target) && !["open", "hidden"].includes(name)) throw Error(`the stub has no ${String(name)}`);
        return target[name];
      },
      set: (target, name, value) => {
        const known = ["className", "textContent", "id", "href", "title", "name", "value", "open", "hidden", "nodes",
          "parentNode", "text"];
        if (!known.includes(name)) throw Error(`the stub has no ${name} that can be set`);
        target[name] = value;
        return true;
      }});
  }
  get firstChild() { return this.nodes[0] ?? null; }
  get textContent() { return this.text; }
  set textContent(text) { this.text = String(text); this.nodes = []; }
  appendChild(node) { node.parentNode = this; this.nodes.push(node); return node; }
  remove() { this.parentNode.nodes = this.parentNode.nodes.filter(node => node != this); }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(name, work) { this.events[name] = work; }
  scrollIntoView() {}
  all() { return this.nodes.flatMap(node => [node, ...node.all()]); }
  querySelectorAll(selector) {
    return this.all().filter(node => node.className.split(" ").includes(selector.slice(1)));
  }
  html() {
    const attributes = {...this.attributes, class: this.className || this.attributes.class};
    for (const name of ["id", "href", "title", "name", "value"]) if (name in this) attributes[name] = this[name];
    const words = Object.entries(attributes).filter(([, value]) => value !== undefined)
      .map(([name, value]) => ` ${name}="${escape(value)}"`);
    for (const name of ["open", "hidden"]) if (this[name]) words.push(" " + name);
    const inside = escape(this.text) + this.nodes.map(node => node.html()).join("");
    return `<${this.tag}${words.join("")}>${inside}</${this.tag}>`;
  }
}

const parts = {page: new Element("main"), data: new Element("script")};
parts.data.textContent = json;
const place = {value: hash};
const location = {
  get hash() { return place.value; },
  set hash(text) { place.value = "#" + String(text).replace(/^#/, ""); listeners.forEach(work => work()); }};
vm.runInNewContext(source, {
  location, URLSearchParams, addEventListener: (name, work) => listeners.push(work),
  document: {getElementById: id => parts[id], createElement: tag => new Element(tag),
    createElementNS: (space, tag) => new Element(tag)}});
for (const choice of choices) {
  const [name, value] = choice.split("=");
  const select = parts.page.all().find(node => node.tag == "select" && node.name == name);
  select.value = value;
  select.events.change();
}
process.stdout.write(parts.page.html());
