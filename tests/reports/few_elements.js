// As much of a browser's document as the scripts of a report use: `tree` is [tag, attributes, children], made by the test.
class Element {
  constructor([tag, attributes, children], parent) {
    Object.assign(this, {tag, attributes, parentNode: parent, listeners: {}, focused: 0});
    this.children = children.map(child => new Element(child, this));
    this.style = {
      backgroundPosition: '',
      getPropertyValue: name => (attributes.style || '').split(';').find(part => part.startsWith(name + ':'))?.split(':')[1] ?? '',
    };
    this.dataset = Object.fromEntries(Object.entries(attributes).filter(([name]) => name.startsWith('data-'))
      .map(([name, value]) => [name.slice(5), value]));
    this.hidden = 'hidden' in attributes;
    this.value = tag === 'select' ? this.children[0].attributes.value : attributes.value;
    const names = new Set((attributes.class || '').split(' '));
    this.classList = {add: name => names.add(name), remove: name => names.delete(name), contains: name => names.has(name),
      toggle: (name, on) => on ? names.add(name) : names.delete(name)};
  }
  get className() { return this.attributes.class || ''; }
  get type() { return this.attributes.type; }
  get max() { return this.attributes.max; }
  get firstElementChild() { return this.children[0]; }
  get lastElementChild() { return this.children.at(-1); }
  get nextElementSibling() { return this.parentNode.children[this.parentNode.children.indexOf(this) + 1]; }
  is(selector) { return selector[0] === '.' ? this.classList.contains(selector.slice(1)) : this.tag === selector; }
  get all() { return this.children.flatMap(child => [child, ...child.all]); }
  querySelectorAll(selector) {
    const [last, ...outer] = selector.split(' ').reverse();
    return this.all.filter(one => one.is(last) && outer.every(name => one.parentNode.closest(name)));
  }
  querySelector(selector) { return this.querySelectorAll(selector)[0]; }
  closest(selector) { return this.is(selector) ? this : this.parentNode?.closest(selector); }
  append(...moved) { this.children = [...this.children.filter(child => !moved.includes(child)), ...moved]; }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  focus() { this.focused += 1; }
}
globalThis.document = {documentElement: new Element(tree, null)};
document.getElementById = id => document.documentElement.all.find(one => one.attributes.id === id) ?? null;
globalThis.matchMedia = () => ({matches: false});
globalThis.FormData = class {
  constructor(form) { this.pairs = form.querySelectorAll('select').map(one => [one.attributes.name, one.value]); }
  [Symbol.iterator]() { return this.pairs[Symbol.iterator](); }
};
const list = document.getElementById('cards'), form = document.getElementById('filter');
const choose = choices => {
  for (const select of form.querySelectorAll('select')) select.value = choices[select.attributes.name] ?? select.children[0].attributes.value;
  form.onchange();
  return list.children.filter(card => !card.hidden).map(card => +card.dataset.number);
};
