(()=>{const list=document.getElementById('cards'),form=document.getElementById('filter');if(!list)return;
const PORTION=24,FEW=8,cards=[...list.children],more=document.getElementById('more');let most=PORTION;
const words=text=>text.toLowerCase().split(/\s+/).filter(Boolean);
const said=new Map(cards.map(card=>[card,card.firstElementChild.textContent.toLowerCase()]));
const answers=(card,model,question)=>[...card.querySelectorAll('.marks li')].filter(mark=>
(!model||mark.closest('figure').dataset.model===model)&&(!question||mark.dataset.question===question));
const count=(marks,kind)=>marks.filter(mark=>mark.className===kind).length;
const differ=marks=>{const seen={};return marks.some(mark=>{const q=mark.dataset.question;seen[q]??=mark.className;
return seen[q]!==mark.className})};
const fits=(card,{model,question,verdict,kind,agent,...chosen})=>{
if(kind&&card.dataset.kind!==kind||agent&&card.dataset.agent!==agent)return false;
if(!words(chosen.words).every(word=>said.get(card).includes(word)))return false;
if(!verdict)return true;
const marks=answers(card,verdict==='differ'?'':model,question);
return verdict==='differ'?differ(marks):verdict==='yes'?marks.length>0&&count(marks,'yes')===marks.length:
count(marks,verdict)>0};
const apply=()=>{const chosen=Object.fromEntries(new FormData(form));
const failures=new Map(cards.map(card=>[card,chosen.order==='record'?0:
count(answers(card,chosen.model||form.dataset.lead,chosen.question),'no')]));
const sorted=[...cards].sort((a,b)=>failures.get(b)-failures.get(a)||a.dataset.number-b.dataset.number);
if(sorted.some((card,i)=>list.children[i]!==card))list.append(...sorted);
const found=sorted.filter(card=>fits(card,chosen)),room=found.length-most>FEW?most:found.length;
const shown=new Set(found.slice(0,room));
for(const card of cards){card.hidden=!shown.has(card);
for(const figure of card.querySelectorAll('figure'))
figure.hidden=Boolean(chosen.model&&figure.dataset.model&&figure.dataset.model!==chosen.model)}
list.classList.toggle('alone',Boolean(chosen.model));
const rest=found.length-room;more.hidden=!rest;more.textContent=`Show ${Math.min(PORTION,rest)} more tasks`;
form.querySelector('output').textContent=`${found.length} of ${cards.length} tasks${rest?`, ${room} shown`:''}`};
const anew=()=>{most=PORTION;apply()};
if(form){form.hidden=false;form.onsubmit=event=>event.preventDefault();form.oninput=anew;
form.onreset=()=>setTimeout(anew);anew();
more.onclick=()=>{const seen=new Set(cards.filter(card=>!card.hidden));most+=PORTION;apply();
const next=[...list.children].find(card=>!card.hidden&&!seen.has(card));next.querySelector('summary').focus()}}
for(const row of list.querySelectorAll('.scrub'))row.hidden=false;
list.addEventListener('input',({target})=>{if(target.type!=='range')return;const films=target.closest('.films');
films.classList.add('held');target.nextElementSibling.hidden=false;
target.setAttribute('aria-valuetext',`frame ${+target.value+1} of ${+target.max+1}`);
for(const film of films.querySelectorAll('.film')){const last=film.style.getPropertyValue('--n')-1;
film.style.backgroundPosition=`${100*Math.round(target.value/target.max*last)/last}% 0`}});
list.addEventListener('click',({target})=>{const row=target.closest('button')?.closest('.scrub');if(!row)return;
row.parentNode.classList.remove('held');row.firstElementChild.focus();row.lastElementChild.hidden=true;
for(const film of row.parentNode.querySelectorAll('.film'))film.style.backgroundPosition=''})})();
