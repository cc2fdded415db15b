// Sends the files of one record, one after the other, then tells the page's server part under which token they lie.
const input = element.querySelector("input");
const box = element.querySelector(".drop");
const state = element.querySelector(".state");
const largest = Number(box.dataset.largest);

async function put(token, file) {
  try {
    const answer = await fetch(`received/${token}/${encodeURIComponent(file.name)}`, { method: "PUT", body: file });
    return answer.ok ? "" : await answer.text();
  } catch {
    return "The upload broke off. Try again.";
  }
}

async function send(files) {
  if (!files.length) return;
  const token = Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
  let refusal = files.reduce((sum, file) => sum + file.size, 0) > largest ? box.dataset.tooLarge : "";
  for (const file of files) {
    if (refusal) break;
    state.textContent = `Sending ${file.name} ...`;
    refusal = await put(token, file);
  }
  state.textContent = "";
  input.value = "";
  trigger("submit", { token, refusal });
}

input.addEventListener("change", () => send(Array.from(input.files)));
box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
box.addEventListener("dragleave", () => box.classList.remove("over"));
box.addEventListener("drop", (event) => {
  event.preventDefault();
  box.classList.remove("over");
  send(Array.from(event.dataTransfer.files));
});
