// The page: the networks are started, an image comes in, and each network's classes are shown.

const facts = JSON.parse(document.getElementById("facts").textContent);
const [HEIGHT, WIDTH, CHANNELS] = facts.shape;
const PIXELS = `${HEIGHT} x ${WIDTH} ${CHANNELS === 1 ? "gray pixels" : "pixels"}`;
const FEW_CLASSES = 10; // are all shown, in their order; of more, the likeliest
const MOST_SHOWN = 5;
const LONG_NAME = 8; // letters: a bar has no room beside it
const [MEASUREMENTS, MEASURED_MS, WARM_UP_MS] = [11, 20, 100]; // of the latency, per network

const $ = (id) => document.getElementById(id);

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function say(error) {
  $("problem").textContent = error instanceof Problem ? error.message : `Something went wrong: ${error?.message ?? error}`;
  $("problem").hidden = false;
}

// ---- the networks

async function unpack(id) {
  const packed = Uint8Array.from(atob($(`packed-${id}`).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

let ort;
const sessions = [];

async function start() {
  if (!globalThis.DecompressionStream || !globalThis.WebAssembly) {
    throw new Problem("This browser is too old for this page: it needs Chrome 91, Firefox 113, Safari 16.4 or newer");
  }
  try {
    const script = new Blob([await unpack("runtime-script")], { type: "text/javascript" });
    ort = await import(URL.createObjectURL(script));
    Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: await unpack("runtime-wasm") });
    for (let i = 0; i < facts.students.length; i++) {
      sessions.push(await ort.InferenceSession.create(await unpack(`network-${i}`), { executionProviders: ["wasm"] }));
    }
  } catch (error) {
    throw new Problem(`The networks do not start in this browser: ${error?.message ?? error}`);
  }
}

// Returns pixels, any number of images after each other, as the networks take them: (pixel / 255 - mean) / std.
function normalized(pixels) {
  const [mean, std] = [facts.mean, facts.std].map((values) => Float32Array.from(values));
  return Float32Array.from(pixels, (pixel, i) => {
    const channel = i % CHANNELS;
    const centered = Math.fround(Math.fround(pixel / 255) - mean[channel % mean.length]);
    return centered / std[channel % std.length];
  });
}

// Returns the logits of images one after the other. The runtime takes one call at a time.
let lastCall = Promise.resolve();
function logits(session, inputs) {
  const number = inputs.length / (HEIGHT * WIDTH * CHANNELS);
  const call = lastCall.then(async () => {
    const images = new ort.Tensor("float32", inputs, [number, HEIGHT, WIDTH, CHANNELS]);
    return (await session.run({ images })).logits.data;
  });
  lastCall = call.catch(() => {});
  return call;
}

function softmax(values) {
  const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(values, (value) => Math.exp(value - most));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

// Returns the median time of a call of each network, in milliseconds. Clocks of browsers are coarse: a measurement is as
// many calls as take a while. Networks take turns, as a browser compiles the runtime better while it runs.
async function latencies(inputs) {
  const time = async (session, calls) => {
    const began = performance.now();
    for (let i = 0; i < calls; i++) await logits(session, inputs);
    return (performance.now() - began) / calls;
  };
  const calls = [];
  for (const session of sessions) {
    let [number, each] = [1, 0];
    while (number * (each = await time(session, number)) < WARM_UP_MS) number *= 2;
    calls.push(Math.ceil(MEASURED_MS / each));
  }
  const times = sessions.map(() => []);
  for (let i = 0; i < MEASUREMENTS; i++) {
    for (const [j, session] of sessions.entries()) {
      times[j].push(await time(session, calls[j]));
      await new Promise((go) => setTimeout(go)); // the page stays alive
    }
  }
  return times.map((each) => each.sort((a, b) => a - b)[(MEASUREMENTS - 1) / 2]);
}

// ---- what is shown

const cards = facts.students.map((student) => {
  const card = element("article");
  card.append(element("h3", student.name), element("p", student.kind, "kind"));
  const answer = element("p", "", "answer");
  const bars = element("ol", "", facts.classes.some((name) => name.length > LONG_NAME) ? "bars long" : "bars");
  const list = element("dl");
  const row = (name, value, title = "") => {
    const cell = element("dd", value);
    const term = element("dt", name);
    term.title = title;
    list.append(term, cell);
    return cell;
  };
  if (student.parameters) row("Parameters", student.parameters.toLocaleString("en"));
  row("Size", `${Math.ceil(student.bytes / 1000).toLocaleString("en")} kB`, "size of the ONNX file");
  if (student.top1 !== null) row(`Top-1, ${student.evaluated_on}`, `${student.top1.toFixed(2)} %`, "as recorded by the run");
  const time = row("Latency here", "...", "median time for one image in this browser, one thread");
  card.append(answer, bars, list);
  $("students").append(card);
  return { answer, bars, time };
});

function showNoClasses({ answer, bars }) {
  answer.replaceChildren();
  if (facts.classes.length > FEW_CLASSES) bars.replaceChildren();
  else showBars(bars, facts.classes.map(() => null));
}

const perCent = (share) => (share === null ? "" : `${(100 * share).toFixed(1)} %`);

function showClasses({ answer, bars }, shares) {
  const first = shares.indexOf(Math.max(...shares));
  answer.replaceChildren(element("b", facts.classes[first]), element("span", perCent(shares[first])));
  showBars(bars, shares, first);
}

function showBars(bars, shares, first = -1) {
  let places = facts.classes.map((_, place) => place);
  if (places.length > FEW_CLASSES) places = places.sort((a, b) => shares[b] - shares[a]).slice(0, MOST_SHOWN);
  bars.replaceChildren(
    ...places.map((place) => {
      const line = element("li", "", place === first ? "first" : "");
      const bar = element("span", "", "bar");
      bar.append(element("i"));
      bar.firstChild.style.width = `${100 * shares[place]}%`;
      const name = element("span", facts.classes[place], "name");
      name.title = facts.classes[place];
      const share = element("span", perCent(shares[place]), "share");
      line.append(...(bars.classList.contains("long") ? [name, share, bar] : [name, bar, share]));
      return line;
    }),
  );
}

// Paints an image with 1 or 3 channels on a canvas of its size.
function paint(canvas, { height, width, channels, data }) {
  Object.assign(canvas, { height, width });
  const shown = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) shown.data[4 * i + c] = data[i * channels + (channels === 3 ? c : 0)];
    shown.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(shown, 0, 0);
}

// What is to be classified, and whether a run is under way: of images that come meanwhile, only the last counts.
let [wanted, running] = [null, null];

async function classify(image, about) {
  paint($("seen"), image);
  $("seen-text").textContent = `What the networks see: ${about}`;
  $("seen").hidden = false;
  $("problem").hidden = true;
  wanted = normalized(image.data);
  running ??= (async () => {
    try {
      await ready;
      while (wanted) {
        const inputs = wanted;
        wanted = null;
        for (const [i, session] of sessions.entries()) {
          const found = await logits(session, inputs);
          if (wanted !== nothing) showClasses(cards[i], softmax(found));
        }
      }
    } catch (error) {
      say(error);
    } finally {
      running = null;
    }
  })();
  await running;
}

// ---- images

const stage = $("stage").getContext("2d");
const nothing = undefined; // in place of an image: the stage was cleared meanwhile
let strokes = [];

function clear() {
  strokes = [];
  wanted = nothing;
  stage.clearRect(0, 0, stage.canvas.width, stage.canvas.height);
  $("hint").hidden = false;
  $("seen").hidden = true;
  $("seen-text").textContent = "";
  $("problem").hidden = true;
  cards.forEach(showNoClasses);
}

// Shows something that canvases can draw in the middle of the stage.
function showOnStage(source, width, height, smooth) {
  clear();
  $("hint").hidden = true;
  const size = stage.canvas.width;
  const scale = size / Math.max(width, height);
  stage.imageSmoothingEnabled = smooth;
  stage.drawImage(source, (size - width * scale) / 2, (size - height * scale) / 2, width * scale, height * scale);
}

async function takeFile(blob) {
  const name = blob.name || "what was pasted";
  try {
    const image = await decode(blob, name);
    const input = fit(image, facts);
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { height: image.height, width: image.width });
    const pixels = new ImageData(image.width, image.height);
    for (let i = 0, o = 0; i < image.data.length; i += 3, o += 4) {
      pixels.data.set([image.data[i], image.data[i + 1], image.data[i + 2], 255], o);
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    showOnStage(canvas, image.width, image.height, true);
    const what = facts.crop ? "the center of the image" : "the image";
    await classify(input, `${what}, ${image.height} x ${image.width} pixels, as ${PIXELS}`);
  } catch (error) {
    clear();
    say(error);
  }
}

async function showExamples() {
  const pixels = await unpack("examples");
  const size = HEIGHT * WIDTH * CHANNELS;
  for (let i = 0; i < pixels.length / size; i++) {
    const image = { height: HEIGHT, width: WIDTH, channels: CHANNELS, data: pixels.subarray(i * size, (i + 1) * size) };
    const button = element("button");
    button.type = "button";
    button.setAttribute("aria-label", `Test image ${i + 1}`);
    const canvas = element("canvas");
    button.append(canvas);
    paint(canvas, image);
    button.addEventListener("click", () => {
      showOnStage(canvas, WIDTH, HEIGHT, false);
      classify(image, `a test image, ${PIXELS}`);
    });
    $("examples").append(button);
  }
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) takeFile($("file").files[0]);
  $("file").value = ""; // the same file may be chosen again
});
$("clear").addEventListener("click", clear);

// Whatever is dropped or pasted stays in the page; a browser would leave the page to show it.
const givenFile = (transfer) => [...transfer.files][0];
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const file = givenFile(event.dataTransfer);
  if (file) takeFile(file);
  else say(new Problem("That was no file: save the image, and drop the file"));
});
addEventListener("paste", (event) => {
  const file = givenFile(event.clipboardData);
  if (file) takeFile(file);
  else say(new Problem("There is no image in the clipboard: copy one, or a screenshot"));
});

// ---- drawing

function makeDrawable() {
  const canvas = stage.canvas;
  canvas.classList.add("drawable");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Drawing area, for mouse, pen or touch");
  let [pen, line] = [null, []];
  const point = (event) => {
    const { left, top, width } = canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top].map((place) => (place * canvas.width) / width);
  };
  const draw = () => {
    stage.lineCap = stage.lineJoin = "round";
    stage.lineWidth = (facts.drawings.stroke / Math.max(HEIGHT, WIDTH)) * canvas.width * 0.7;
    stage.strokeStyle = "#1c1d20";
    stage.beginPath();
    const [x, y] = line.at(-1);
    stage.moveTo(...(line.at(-2) ?? [x - 0.1, y])); // a dot is a line, too
    stage.lineTo(x, y);
    stage.stroke();
    const image = render(strokes, facts.drawings, facts.shape);
    classify(image, `your drawing as ${PIXELS}, scaled and centered like the test images`);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (pen !== null || event.button > 0) return;
    pen = event.pointerId;
    canvas.setPointerCapture(pen);
    if (!strokes.length) {
      clear();
      $("hint").hidden = true;
    }
    line = [point(event)];
    strokes.push(line);
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pen) return;
    line.push(point(event));
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      if (event.pointerId === pen) pen = null;
    });
  }
}

// ---- the beginning

const ways = "choose, drop or paste an image";
$("hint").textContent = facts.drawings ? `Draw here, or ${ways}` : ways[0].toUpperCase() + ways.slice(1);
if (facts.drawings) makeDrawable();
$("notes").textContent =
  "Top-1 is what the run recorded. Latency here is the median time for one image in this browser, on one thread." +
  (facts.drawings
    ? " A drawing is scaled, centered and inked like the test images. It is none of them, though: expect more mistakes " +
      "than top-1 says."
    : "");
clear();
showExamples().catch(say);

const ready = start();
const measured = ready.then(async () => {
  $("status").textContent = "Ready. The latency is being measured ...";
  const times = await latencies(normalized(new Uint8Array(HEIGHT * WIDTH * CHANNELS)));
  times.forEach((ms, i) => (cards[i].time.textContent = `${ms.toPrecision(ms < 100 ? 2 : 3)} ms`));
  $("status").textContent = "";
});
measured.catch((error) => {
  $("status").textContent = "";
  say(error);
});

// For `ekd export`, which compares the page with JAX, and for the console of a browser.
globalThis.ekd = {
  ready,
  measured,
  settled: async () => running, // all that was drawn or chosen has been classified
  facts,
  decode,
  fit: (image, options = {}) => fit(image, { ...facts, ...options }),
  render: (strokes, form = facts.drawings, shape = facts.shape) => render(strokes, form, shape),
  // The logits of images, pixels in base64 after each other: a list per network.
  async logits(pixels) {
    await ready;
    const inputs = normalized(Uint8Array.from(atob(pixels), (letter) => letter.charCodeAt(0)));
    const found = [];
    for (const session of sessions) found.push(Array.from(await logits(session, inputs)));
    return found;
  },
};
