// Drawings as images of the data set: sized, stretched, placed and inked as its own (ekd_jax/students/formats/drawings.py).

const SAMPLES = 8; // along each axis of a pixel

// Returns an image of strokes, or null where there are none. A stroke is a list of points [x, y], in any unit.
function render(strokes, form, [height, width]) {
  const points = strokes.flat();
  if (!points.length) return null;
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, top] = [Math.min(...xs), Math.min(...ys)];
  const [wide, high] = [Math.max(...xs) - left, Math.max(...ys) - top];
  const [scaleX, scaleY] = scales(wide, high, form);
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  context.canvas.width = width * SAMPLES;
  context.canvas.height = height * SAMPLES;

  // Draws with the middle of height and width at (y, x), and returns how much of each pixel is covered, 0 to 1.
  const drawn = (y, x) => {
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "black";
    context.fillRect(0, 0, context.canvas.width, context.canvas.height);
    context.setTransform(SAMPLES * scaleX, 0, 0, SAMPLES * scaleY, SAMPLES * x, SAMPLES * y);
    context.strokeStyle = "white";
    context.lineWidth = form.stroke / scaleY; // stretched with the drawing
    context.lineCap = context.lineJoin = "round";
    for (const stroke of strokes) {
      const placed = stroke.map(([px, py]) => [px - left - wide / 2, py - top - high / 2]);
      context.beginPath();
      context.moveTo(...placed[0]);
      context.lineTo(placed[0][0] + 1e-3, placed[0][1]); // a dot is a line, too
      for (const point of placed) context.lineTo(...point);
      context.stroke();
    }
    return covered(context, height, width);
  };

  let [y, x] = form.by_mass ? [height / 2, width / 2] : form.center;
  let ink = drawn(y, x);
  if (form.by_mass) {
    const [massY, massX] = centerOfMass(ink, width);
    ink = drawn(y + form.center[0] - massY, x + form.center[1] - massX);
  }
  const data = Uint8Array.from(ink, (share) => Math.round(form.background + (form.ink - form.background) * share));
  return { height, width, channels: 1, data };
}

// Returns by how much a drawing is scaled along x and y, so that with its stroke it has the data set's size.
function scales(wide, high, form) {
  const [x, y] = [wide ? (form.width - form.stroke) / wide : Infinity, high ? (form.height - form.stroke) / high : Infinity];
  const least = Math.max(0, Math.min(x, y));
  if (!Number.isFinite(least)) return [1, 1]; // a dot
  if (form.most_stretch === 1) return [least, least];
  const scaleY = Math.min(y, least * form.most_stretch);
  return [Math.min(form.width / (wide + form.stroke / scaleY), scaleY * form.most_stretch), scaleY];
}

function covered(context, height, width) {
  const { data } = context.getImageData(0, 0, width * SAMPLES, height * SAMPLES);
  const ink = new Float64Array(height * width);
  const row = width * SAMPLES;
  for (let i = 0; i < row * height * SAMPLES; i++) {
    const [y, x] = [Math.floor(i / row / SAMPLES), Math.floor((i % row) / SAMPLES)];
    ink[y * width + x] += data[4 * i] / 255 / SAMPLES ** 2;
  }
  return ink;
}

function centerOfMass(ink, width) {
  let [total, y, x] = [0, 0, 0];
  ink.forEach((share, i) => {
    total += share;
    y += share * (Math.floor(i / width) + 0.5);
    x += share * ((i % width) + 0.5);
  });
  return total ? [y / total, x / total] : [0, 0];
}
