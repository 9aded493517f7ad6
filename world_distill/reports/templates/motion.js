(()=>{const root=document.documentElement,button=document.getElementById('motion');if(!button)return;
let still=matchMedia('(prefers-reduced-motion: reduce)').matches;
const show=()=>{root.classList.toggle('still',still);button.textContent=still?'Play the clips':'Stop the clips'};
button.hidden=false;show();
button.onclick=()=>{still=!still;if(!still)root.classList.add('moving');show()}})();
