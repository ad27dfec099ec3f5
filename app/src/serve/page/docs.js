'use strict';
const make = (tag, text, ...children) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
};
const row = (...cells) => make('tr', '', ...cells.map((c) => (c instanceof Node ? make('td', '', c) : make('td', c))));

function values(schema) {
  const parts = [];
  if (schema.type) parts.push([schema.type].flat().join(' or '));
  if (schema.oneOf) parts.push(schema.oneOf.map((s) => s.type).join(' or '));
  if (schema.enum) parts.push(schema.enum.map((v) => JSON.stringify(v)).join(', '));
  if (schema.minimum !== undefined) parts.push(`${schema.minimum} to ${schema.maximum}`);
  if (schema.default !== undefined) parts.push(`default ${JSON.stringify(schema.default)}`);
  return parts.join('; ');
}

function table(schema) {
  const rows = Object.entries(schema.properties).map(([name, s]) => row(make('code', name), values(s), s.description ?? ''));
  return make('table', '', ...rows);
}

function operation(document, method, path, op) {
  const section = make('section', '', make('h3', '', make('code', `${method.toUpperCase()} ${path}`)), make('p', op.summary));
  const reference = op.requestBody?.content['application/json'].schema.$ref;
  if (reference) {
    const name = reference.split('/').pop();
    section.append(make('details', '', make('summary', `Body: ${name}`), table(document.components.schemas[name])));
  }
  section.append(make('table', '', ...Object.entries(op.responses).map(([code, r]) => row(code, r.description))));
  return section;
}

async function load() {
  const main = window.document.getElementById('docs');
  try {
    const document = await (await fetch('openapi.json')).json();
    window.document.getElementById('what').textContent = document.info.description;
    const example = [
      `curl ${location.origin}/v1/images/generations -H 'content-type: application/json' \\`,
      `  -d '{"class_label": 0, "seed": 7, "steps": 25, "guidance_scale": 3, "response_format": "png"}' > picture.png`,
    ].join('\n');
    main.replaceChildren(make('pre', example));
    const tags = new Map();
    for (const [path, methods] of Object.entries(document.paths)) {
      for (const [method, op] of Object.entries(methods)) {
        const tag = op.tags[0];
        if (!tags.has(tag)) tags.set(tag, []);
        tags.get(tag).push(operation(document, method, path, op));
      }
    }
    for (const [tag, sections] of tags) main.append(make('h2', tag), ...sections);
  } catch (error) {
    main.replaceChildren(make('p', `The document cannot be read: ${error.message}`));
  }
}
load();
