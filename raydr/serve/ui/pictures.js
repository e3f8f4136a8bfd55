/* The query's picture: chosen, dropped or pasted, and a data: URL from then on.
   One of at most 1024 pixels a side, in a format the server reads, is sent as its file is; any other that the browser
   can read is drawn smaller first, so that a camera's picture fits the server's limits. */

const SIDE = 1024;
const BYTES = 2 ** 20;
const READ_BY_THE_SERVER = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

export class NoPictureError extends Error {}

/** {data, name} of a file. Throws NoPictureError. */
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new NoPictureError(`${file.name || "What was pasted"} is no picture that this browser can read.`);
  }
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  const fits = scale >= 1 && file.size <= BYTES && READ_BY_THE_SERVER.includes(file.type);
  return { data: await dataUrl(fits ? file : await drawn(bitmap, Math.min(scale, 1))), name: file.name };
}

/** Calls `onFile(file)` for every file chosen with `button` and `input`, dropped on the page, or pasted into it, while
    `accepts()`. */
export function watchFiles(button, input, accepts, onFile) {
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files.length) onFile(input.files[0]);
    input.value = ""; // the same file may be chosen again
  });
  const dropping = (is) => document.body.classList.toggle("dropping", is);
  addEventListener("dragover", (event) => {
    if (!accepts() || !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    dropping(true);
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) dropping(false);
  });
  addEventListener("drop", (event) => {
    dropping(false);
    const [file] = event.dataTransfer.files;
    if (!accepts() || !file) return;
    event.preventDefault();
    onFile(file);
  });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (!accepts() || !file) return;
    event.preventDefault();
    onFile(file);
  });
}

/** A JPEG, on white where the picture is transparent, as the server puts it too. */
async function drawn(bitmap, scale) {
  const size = (side) => Math.max(1, Math.round(side * scale));
  const canvas = new OffscreenCanvas(size(bitmap.width), size(bitmap.height));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new NoPictureError("The file could not be read."));
    reader.readAsDataURL(blob);
  });
}
