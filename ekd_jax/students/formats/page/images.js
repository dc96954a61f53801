// Images as pixels: the same values as ekd_jax/data/decode.py gives, computed in the browser.

// A mistake that the user can mend: one line.
class Problem extends Error {}

// Returns the upright RGB pixels of an image file: {height, width, channels: 3, data}. Of several frames the first is
// read, color profiles are ignored and transparency is dropped, as Python does.
async function decode(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, {
      imageOrientation: "from-image",
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new Problem(`${name} is not an image that this browser can read: choose a JPEG, PNG, WebP or GIF`);
  }
  const { height, width } = bitmap;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  let rgba;
  try {
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    rgba = context.getImageData(0, 0, width, height).data;
  } catch {
    throw new Problem(`${name} has ${width} x ${height} pixels, too many for this browser: make it smaller`);
  }
  for (let i = 3; i < rgba.length; i += 4) {
    if (rgba[i] !== 255) {
      rgba = behindTransparency(bitmap, name);
      break;
    }
  }
  const data = new Uint8Array(height * width * 3);
  for (let i = 0, o = 0; i < rgba.length; i += 4) {
    data[o++] = rgba[i];
    data[o++] = rgba[i + 1];
    data[o++] = rgba[i + 2];
  }
  return { height, width, channels: 3, data };
}

// Returns the RGBA pixels of a bitmap with transparent parts. A 2D canvas multiplies colors by their opacity, and
// cannot give them back; a texture leaves them as they are.
function behindTransparency(bitmap, name) {
  const { height, width } = bitmap;
  const gl = document.createElement("canvas").getContext("webgl");
  if (!gl || Math.max(height, width) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    throw new Problem(`${name} has transparent parts, which this browser cannot read: save it without them`);
  }
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const rgba = new Uint8Array(height * width * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return rgba;
}

// Returns RGB pixels as one gray channel, as Pillow's convert("L").
function gray({ height, width, data }) {
  const one = new Uint8Array(height * width);
  for (let i = 0; i < one.length; i++) {
    one[i] = (data[3 * i] * 19595 + data[3 * i + 1] * 38470 + data[3 * i + 2] * 7471 + 0x8000) >> 16;
  }
  return { height, width, channels: 1, data: one };
}

// Returns for each of `outputs` places the first input pixel and the weights of a triangle filter, as Pillow's BILINEAR:
// wider where the image becomes smaller; weights are integers of 22 bits behind the point.
function weights(inputs, outputs) {
  const scale = inputs / outputs;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: outputs }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - stretch + 0.5));
    const end = Math.min(inputs, Math.trunc(center + stretch + 0.5));
    const each = [];
    for (let i = first; i < end; i++) {
      each.push(Math.max(0, 1 - Math.abs((i - center + 0.5) * (1 / stretch))));
    }
    const total = each.reduce((sum, value) => sum + value, 0);
    return [first, each.map((value) => Math.trunc(0.5 + (value / total) * (1 << 22)))];
  });
}

// Resizes along rows, or along columns; what is between the two passes is rounded to 8 bits, as in Pillow.
function resizeAlong({ height, width, channels, data }, size, vertical) {
  const [newHeight, newWidth] = vertical ? [size, width] : [height, size];
  const step = vertical ? width * channels : channels; // between neighbors along the axis
  const places = weights(vertical ? height : width, size);
  const resized = new Uint8Array(newHeight * newWidth * channels);
  for (let y = 0, o = 0; y < newHeight; y++) {
    for (let x = 0; x < newWidth; x++) {
      const [first, each] = places[vertical ? y : x];
      const start = vertical ? first * step + x * channels : y * width * channels + first * step;
      for (let c = 0; c < channels; c++, o++) {
        let sum = 1 << 21;
        for (let k = 0, i = start + c; k < each.length; k++, i += step) sum += data[i] * each[k];
        resized[o] = Math.min(255, Math.max(0, sum >> 22));
      }
    }
  }
  return { height: newHeight, width: newWidth, channels, data: resized };
}

function resize(image, height, width, adaptive) {
  // Pillow 13 begins with the columns of an image that becomes smaller along them above all; before, it never did.
  const columnsFirst = adaptive && image.height > height && image.height - height > 2 * (image.width - width);
  for (const vertical of [columnsFirst, !columnsFirst]) {
    const size = vertical ? height : width;
    if ((vertical ? image.height : image.width) !== size) image = resizeAlong(image, size, vertical);
  }
  return image;
}

// Python's round: halves go to the even number.
function round(value) {
  const down = Math.floor(value);
  if (value - down !== 0.5) return Math.round(value);
  return down % 2 ? down + 1 : down;
}

// Cuts out the center after the short side became 256/224 of the result's.
function centerCrop(image, height, width, adaptive) {
  const { height: h, width: w, channels } = image;
  const short = round(Math.min(height, width) * (256 / 224));
  const [newHeight, newWidth] =
    h <= w ? [short, Math.trunc((short * w) / h)] : [Math.trunc((short * h) / w), short];
  if (newHeight * newWidth > MAX_PIXELS) throw new Problem("the image is too long and narrow: cut out a part of it");
  const all = resize(image, newHeight, newWidth, adaptive);
  const [top, left] = [round((newHeight - height) / 2), round((newWidth - width) / 2)];
  const data = new Uint8Array(height * width * channels);
  for (let y = 0; y < height; y++) {
    const start = ((top + y) * newWidth + left) * channels;
    data.set(all.data.subarray(start, start + width * channels), y * width * channels);
  }
  return { height, width, channels, data };
}

const MAX_PIXELS = 178956970; // as in Python

// Brings RGB pixels to the input of the networks, as `read_image` does in Python.
function fit(image, { shape: [height, width, channels], crop, adaptive }) {
  if (channels === 1) image = gray(image);
  return (crop ? centerCrop : resize)(image, height, width, adaptive);
}
