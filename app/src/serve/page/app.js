'use strict';
const $ = (id) => document.getElementById(id);
const PREVIEWS = 24;
let info = null, model = null, shots = [], shown = 0, running = null;

const option = (value, text) => Object.assign(document.createElement('option'), { value, textContent: text ?? value });

function say(text, bad = false) {
  $('status').textContent = text;
  $('status').classList.toggle('bad', bad);
}

async function load() {
  let answer;
  try {
    answer = await fetch('info');
    info = await answer.json();
  } catch (error) {
    say(`The server does not answer: ${error.message}`, true);
    return;
  }
  $('model').replaceChildren(...info.models.map((m) => option(m.id)));
  $('model-row').hidden = info.models.length < 2;
  $('key-row').hidden = !info.api_key_needed;
  $('key').value = sessionStorage.getItem('key') ?? '';
  choose();
  if (!info.ready) {
    say('The server is loading its models …');
    setTimeout(load, 1000);
  } else if (!running) {
    say('');
  }
}

function choose() {
  model = info.models.find((m) => m.id === $('model').value) ?? info.models[0];
  const name = (i) => (model.class_names ? `@${i} ${model.class_names[i]}` : `class ${i}`);
  const classes = Array.from({ length: model.classes }, (_, i) => option(i, name(i)));
  if (model.unconditional) classes.push(option('none', 'no class'));
  $('label').replaceChildren(...classes);
  $('sampler').replaceChildren(...model.samplers.map((s) => option(s)));
  $('sampler').value = model.default_sampler;
  $('steps').max = Math.min(model.max_steps, 250);
  $('count').max = model.max_images;
  $('guidance').disabled = model.max_guidance_scale === 1;
  if ($('guidance').disabled) $('guidance').value = 1;
  $('what').textContent = `${model.id}: ${model.size} pictures of ${model.classes} classes`;
  echo();
}

function echo() {
  $('steps-value').textContent = $('steps').value;
  const classless = $('label').value === 'none' && !$('every').checked;
  $('guidance-value').textContent = classless ? 'none without a class' : $('guidance').value === '1' ? 'none' : $('guidance').value;
  $('count-value').textContent = $('every').checked ? Math.min(model?.classes ?? 1, model?.max_images ?? 1) : $('count').value;
  $('count').disabled = $('every').checked;
  $('label').disabled = $('every').checked;
}

function request() {
  const every = $('every').checked;
  const label = $('label').value === 'none' ? null : Number($('label').value);
  const body = {
    model: model.id,
    class_label: every ? Array.from({ length: Math.min(model.classes, model.max_images) }, (_, i) => i) : label,
    seed: Number($('seed').value),
    steps: Number($('steps').value),
    sampler: $('sampler').value,
    stream: true,
    partial_images: Math.min(PREVIEWS, Number($('steps').value) - 1, model.max_partial_images),
    n: every ? Math.min(model.classes, model.max_images) : Number($('count').value),
  };
  body.guidance_scale = !every && label === null ? 1 : Number($('guidance').value);
  return body;
}

const nameOf = (label) => (label === null || label >= model.classes ? 'no class' : model.class_names?.[label] ?? `class ${label}`);

function begin(body) {
  shots = Array.from({ length: body.n }, (_, i) => ({
    label: Array.isArray(body.class_label) ? body.class_label[i] : body.class_label,
    seed: body.seed + i, frames: [], done: 0,
  }));
  shown = 0;
  $('film').hidden = true;
  $('grid').replaceChildren(...(body.n < 2 ? [] : shots.map((shot, i) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.setAttribute('role', 'option');
    const image = document.createElement('img');
    image.alt = '';
    button.append(image, nameOf(shot.label));
    button.addEventListener('click', () => show(i));
    return button;
  })));
  show(0);
}

function show(i) {
  shown = i;
  [...$('grid').children].forEach((button, k) => button.setAttribute('aria-selected', String(k === i)));
  const shot = shots[i];
  const last = shot.frames.length - 1;
  $('film').hidden = last < 1;
  $('film-at').max = Math.max(last, 0);
  $('film-at').value = Math.max(last, 0);
  frame(last);
}

function frame(k) {
  const shot = shots[shown];
  const at = shot.frames[k];
  $('picture').hidden = !at;
  $('blank').hidden = Boolean(at);
  if (at) {
    $('picture').src = at.src;
    $('picture').alt = `${nameOf(shot.label)}, seed ${shot.seed}, after step ${at.step}`;
    $('film-value').textContent = at.step;
  }
  $('caption').textContent = `${nameOf(shot.label)}, seed ${shot.seed}${at && at.step < at.steps ? `, step ${at.step} of ${at.steps}` : ''}`;
}

function take(event) {
  const shot = shots[event.sample];
  if (event.type === 'image_generation.progress') {
    shot.done = event.step / event.steps;
    $('progress').value = shots.reduce((sum, s) => sum + s.done, 0) / shots.length;
    return;
  }
  const steps = event.steps ?? Number($('steps').value);
  shot.frames.push({ src: `data:image/png;base64,${event.b64_json}`, step: event.step ?? steps, steps });
  const thumbnail = $('grid').children[event.sample]?.querySelector('img');
  if (thumbnail) thumbnail.src = shot.frames.at(-1).src;
  if (event.type === 'image_generation.completed') {
    shot.done = 1;
    shot.seed = event.seed;
    $('progress').value = shots.reduce((sum, s) => sum + s.done, 0) / shots.length;
  }
  if (event.sample === shown) show(shown);
}

async function read(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const frames = text.split('\n\n');
    text = frames.pop();
    for (const one of frames) {
      const data = one.split('\n').find((line) => line.startsWith('data: '))?.slice(6);
      if (!data || data === '[DONE]') continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      take(event);
    }
  }
}

async function make(event) {
  event.preventDefault();
  if (running || !model || !$('form').reportValidity()) return;
  const body = request();
  const headers = { 'content-type': 'application/json' };
  if (info.api_key_needed) {
    sessionStorage.setItem('key', $('key').value);
    headers.authorization = `Bearer ${$('key').value}`;
  }
  running = new AbortController();
  $('go').disabled = true;
  $('stop').disabled = false;
  $('progress').value = 0;
  begin(body);
  say('Waiting for a place …');
  const start = performance.now();
  try {
    const answer = await fetch('v1/images/generations', { method: 'POST', headers, body: JSON.stringify(body), signal: running.signal });
    if (!answer.ok) {
      const { error } = await answer.json();
      const again = answer.headers.get('retry-after');
      throw new Error(error.message + (again ? `; try again in ${again} s` : ''));
    }
    say('Making …');
    await read(answer.body);
    say(`${body.n === 1 ? 'One picture' : `${body.n} pictures`} in ${((performance.now() - start) / 1000).toFixed(2)} s`);
  } catch (error) {
    if (error.name === 'AbortError') say('Stopped.');
    else say(error.message, true);
  } finally {
    running = null;
    $('go').disabled = false;
    $('stop').disabled = true;
  }
}

function dice() {
  $('seed').value = Math.floor(Math.random() * 1e6);
}

$('form').addEventListener('submit', make);
$('form').addEventListener('input', echo);
$('model').addEventListener('change', choose);
$('dice').addEventListener('click', dice);
$('stop').addEventListener('click', () => running?.abort());
$('film-at').addEventListener('input', () => frame(Number($('film-at').value)));
$('grid').addEventListener('keydown', (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  const next = (shown + by + shots.length) % shots.length;
  show(next);
  $('grid').children[next].focus();
  event.preventDefault();
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') running?.abort();
  const typing = event.target.matches('input[type=number], input[type=password], select');
  if (event.key.toLowerCase() === 'r' && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) dice();
});
load();
