"use strict";
// Marks tell what they are when pointed at; a network of the front stays picked when
// clicked, so that its name can be copied.
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.style.display = mark ? "block" : "none";
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  const fits = below + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = (fits ? below : event.clientY - tip.offsetHeight - 10) + "px";
});
document.addEventListener("click", (event) => {
  const mark = event.target.closest(".front, .chosen");
  const told = document.getElementById("picked");
  if (!mark || !told) return;
  document.querySelectorAll(".picked").forEach((m) => m.classList.remove("picked"));
  mark.classList.add("picked");
  told.textContent = mark.dataset.tip.replace("\n", ": ");
});
